"""The optimizers, by name."""

from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers.adabound import AdaBound
from fusedopt.optimizers.adadelta import Adadelta
from fusedopt.optimizers.adagrad import Adagrad
from fusedopt.optimizers.adam import Adam, AdamW
from fusedopt.optimizers.adamax import Adamax
from fusedopt.optimizers.adan import Adan
from fusedopt.optimizers.adaptive_memory import AMSGD, AMAdamW
from fusedopt.optimizers.ademamix import AdEMAMix
from fusedopt.optimizers.adopt import ADOPT
from fusedopt.optimizers.asgd import ASGD
from fusedopt.optimizers.entropy_sgd import EntropySGD
from fusedopt.optimizers.koala import KoalaM, KoalaV
from fusedopt.optimizers.lamb import LAMB
from fusedopt.optimizers.lars import LARS
from fusedopt.optimizers.lion import Lion
from fusedopt.optimizers.mbf import MBF
from fusedopt.optimizers.muon import Muon
from fusedopt.optimizers.nadam import NAdam
from fusedopt.optimizers.nadamw import NAdamW
from fusedopt.optimizers.nsgd import NSGD
from fusedopt.optimizers.prodigy import Prodigy
from fusedopt.optimizers.projected import SGDP, AdamP
from fusedopt.optimizers.radam import RAdam
from fusedopt.optimizers.replicated_sgd import ReplicatedSGD
from fusedopt.optimizers.rmsprop import RMSprop
from fusedopt.optimizers.rprop import Rprop
from fusedopt.optimizers.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from fusedopt.optimizers.sgd import SGD
from fusedopt.optimizers.swats import SWATS

__all__ = [
    "ADOPT",
    "AMSGD",
    "ASGD",
    "LAMB",
    "LARS",
    "MBF",
    "NSGD",
    "SGD",
    "SGDP",
    "SWATS",
    "AMAdamW",
    "AdEMAMix",
    "AdaBound",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamP",
    "AdamW",
    "Adamax",
    "Adan",
    "EntropySGD",
    "KoalaM",
    "KoalaV",
    "Lion",
    "Muon",
    "NAdam",
    "NAdamW",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ReplicatedSGD",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
]

OPTIMIZERS: dict[str, type[FusedOptimizer]] = {name: globals()[name] for name in sorted(__all__)}
