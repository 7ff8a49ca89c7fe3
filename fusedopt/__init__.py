"""Fused optimizers for PyTorch: drop-in ``torch.optim`` classes whose whole step is one launch."""

from importlib.metadata import PackageNotFoundError, version

from fusedopt import diagnostics, optimizers
from fusedopt.backward import step_in_backward
from fusedopt.conversion import convert_state, master_weights
from fusedopt.fuse import fuse
from fusedopt.initialization import GradInit, grad_init
from fusedopt.invariance import scale_invariant_groups
from fusedopt.matrix_groups import muon_groups
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import *  # noqa: F403
from fusedopt.optimizers.nsgd import InputPowers
from fusedopt.options import EMA, GradientNoise, Lookahead

try:
    __version__ = version("fusedopt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["EMA", "FusedOptimizer", "GradInit", "GradientNoise", "InputPowers", "Lookahead", "__version__", "fuse"]
__all__ += ["convert_state", "diagnostics", "grad_init", "master_weights", "muon_groups", "scale_invariant_groups"]
__all__ += ["step_in_backward"]
__all__ += optimizers.__all__
