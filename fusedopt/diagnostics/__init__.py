"""What a choice of optimizer means for a run: convergence conditions, the memory of momentum, curvature.

The functions print a table (``quiet=True``: none), return what they found, and draw it with ``plot="file.png"``. None
changes a model, an optimizer, a gradient or the state of random numbers.
"""

from fusedopt.diagnostics.generic_adam import GenericAdamCheck, check_generic_adam

__all__ = ["GenericAdamCheck", "check_generic_adam"]
