"""What compiled kernels are made of: registers, spills, and how wide they read and write memory."""
