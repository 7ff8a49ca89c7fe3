"""The Triton engine's kernels; installed as fusedopt.triton_kernels.

Rules (rules/, moments.py, math.py) know values. Kernels (norm.py, sums.py, scopes.py, step.py), and what they share
(adding.py, cohort.py, counting.py, walk.py, tile.py, signatures.py), know addresses, types and tiles, and no optimizer
by name.
"""
