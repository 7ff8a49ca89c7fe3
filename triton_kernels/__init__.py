"""Home of the Triton engine's kernels; installed as fusedopt.triton_kernels."""
