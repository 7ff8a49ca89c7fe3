"""What a choice of optimizer means for a run: convergence conditions, the memory of momentum, curvature.

The functions print a table (``quiet=True``: none), return what they found, and draw it with ``plot="file.png"``. None
changes a parameter, a gradient, an optimizer's state or the states of random numbers (torch's, Python's and numpy's).
Buffers are kept by ``lanczos_lr``; ``memory_correction``, which is given no model, leaves what the forward has made of
them.
"""

from fusedopt.diagnostics.correction import MemoryCorrection, memory_correction
from fusedopt.diagnostics.curvature import Curvature, lanczos_lr
from fusedopt.diagnostics.generic_adam import GenericAdamCheck, check_generic_adam
from fusedopt.diagnostics.memory import memory_coefficient

__all__ = ["Curvature", "GenericAdamCheck", "MemoryCorrection", "check_generic_adam", "lanczos_lr"]
__all__ += ["memory_coefficient", "memory_correction"]
