"""The optimizers, by name."""

from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers.adabound import AdaBound
from fusedopt.optimizers.adagrad import Adagrad
from fusedopt.optimizers.adam import Adam, AdamW
from fusedopt.optimizers.lamb import LAMB
from fusedopt.optimizers.lars import LARS
from fusedopt.optimizers.lion import Lion
from fusedopt.optimizers.nadam import NAdam
from fusedopt.optimizers.nadamw import NAdamW
from fusedopt.optimizers.radam import RAdam
from fusedopt.optimizers.rmsprop import RMSprop
from fusedopt.optimizers.sgd import SGD

__all__ = ["LAMB", "LARS", "SGD", "AdaBound", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "NAdamW", "RAdam", "RMSprop"]

OPTIMIZERS: dict[str, type[FusedOptimizer]] = {name: globals()[name] for name in sorted(__all__)}
