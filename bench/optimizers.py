"""The optimizers that are measured, with every option spelled out, because packages differ in their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusedopt.options import DEFAULTS, EMA, GradientNoise


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
        name: What ``--optimizer`` and reports call it.
        optimizer: The class's name in fusedopt.
        lr: Learning rate of the first group.
        options: The other constructor arguments, but for ``weight_decay``, which groups carry as they do ``lr``.
        warmup: Steps before the timed ones.
        weight_decay: Of the first group.
        told: What every step is told besides, such as the loss.
        algorithms: What groups say as ``algorithm``, of hidden layers' matrices and of the rest, if that differs.
        measured: How many streams a step has to read once before it can update, besides the gradients of a norm.
        one_lr: Whether all groups must have the same learning rate.
    """

    name: str
    optimizer: str
    lr: float
    options: dict[str, Any] = field(hash=False)
    warmup: int = 2
    weight_decay: float = 0.01
    algorithms: tuple[str, str] | None = None
    measured: int = 0
    told: dict[str, Any] = field(default_factory=dict, hash=False)
    one_lr: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """What of the options is asked of the engine, and not of the rule."""
        return {name: value for name, value in self.options.items() if name in DEFAULTS}

    @property
    def own(self) -> dict[str, Any]:
        """The others."""
        return {name: value for name, value in self.options.items() if name not in DEFAULTS}


ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "original", "adamw": ADAM}
FREE = {"warmup_steps": 4, "r": 0.0, "weight_lr_power": 2.0}
LOSS = {"loss": 1.0}
BLOCKS = {"momentum": 0.9, "beta": 0.9, "damping": 1e-2, "inverse_every": 20, "max_block_size": 4096}
# Of a size at which bf16 parameters move; and gradients that are always the same would let it grow without end.
DISTANCE = {"d0": 1.0, "d_coef": 1.0, "growth_rate": 1.0}
CASES = {
    case.name: case
    for case in (
        Case("SGD", "SGD", 1e-2, {"momentum": 0.9}),
        Case("Adagrad", "Adagrad", 1e-2, {"lr_decay": 0.0, "eps": 1e-10}),
        Case("RMSprop", "RMSprop", 1e-2, {"alpha": 0.99, "eps": 1e-8}),
        Case("Adam", "Adam", 1e-3, ADAM),
        Case("AdamW", "AdamW", 1e-3, ADAM),
        Case("AdamW EMA", "AdamW", 1e-3, ADAM | {"average": EMA(0.999)}),
        Case("AdamW noise", "AdamW", 1e-3, ADAM | {"gradient_noise": GradientNoise(0.01)}),
        Case("AMSGrad", "AdamW", 1e-3, ADAM | {"amsgrad": True}),
        Case("NAdam", "NAdam", 2e-3, ADAM | {"momentum_decay": 4e-3}),
        Case("NAdamW", "NAdamW", 1e-3, ADAM),
        Case("RAdam", "RAdam", 1e-3, ADAM, warmup=6),  # plain momentum until its sixth step
        Case("AdaBound", "AdaBound", 1e-3, ADAM | {"final_lr": 0.1, "gamma": 1e-3}),
        Case("Adamax", "Adamax", 2e-3, ADAM),
        Case("Adadelta", "Adadelta", 1.0, {"rho": 0.9, "eps": 1e-6}),
        Case("ASGD", "ASGD", 1e-2, {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}),
        Case("Rprop", "Rprop", 1e-2, {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}),  # without weight decay
        Case("LAMB", "LAMB", 2e-3, {"betas": (0.9, 0.999), "eps": 1e-6}, measured=4),
        Case("LARS", "LARS", 1.0, {"momentum": 0.9, "trust_coefficient": 1e-3, "eps": 1e-8}, measured=2),
        Case("AMSGD", "AMSGD", 0.1, {"lam": 0.1, "beta_max": 0.9}, measured=3),
        Case("AMAdamW", "AMAdamW", 1e-3, {"beta2": 0.999, "eps": 1e-8, "lam": 0.1, "beta_max": 0.89}, measured=4),
        Case("AdamP", "AdamP", 1e-3, ADAM | {"delta": 0.1, "wd_ratio": 0.1}, measured=4),
        Case("SGDP", "SGDP", 0.1, {"momentum": 0.9, "eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1}, measured=3),
        Case("NSGD", "NSGD", 1e-2, {"momentum": 0.9}),
        Case("SWATS", "SWATS", 1e-3, ADAM | {"tol": 1e-9}),
        Case("KoalaV", "KoalaV", 1e-3, {"sigma": 0.1, "q": 1.0, "r": 1.0}, weight_decay=0.0, measured=1, told=LOSS),
        Case("KoalaM", "KoalaM", 1e-3, {"r": 1.0}, weight_decay=0.0, measured=3, told=LOSS),
        Case("Lion", "Lion", 1e-4, {"betas": (0.9, 0.99)}),
        Case("Muon", "Muon", 0.02, MUON, algorithms=("muon", "adamw")),
        Case("ScheduleFreeAdamW", "ScheduleFreeAdamW", 2.5e-3, ADAM | FREE),
        Case("ScheduleFreeSGD", "ScheduleFreeSGD", 0.1, {"momentum": 0.9} | FREE),
        Case("AdEMAMix", "AdEMAMix", 1e-3, {"betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "alpha": 5.0}),
        Case(
            "ADOPT", "ADOPT", 1e-3, {"betas": (0.9, 0.9999), "eps": 1e-6, "clip_exp": 0.25}, warmup=3
        ),  # first: sets v
        Case("Adan", "Adan", 1e-3, {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}),
        Case("MBF", "MBF", 1e-3, BLOCKS, algorithms=("blocks", "diagonal")),
        Case("EntropySGD", "EntropySGD", 1.0, {"momentum": 0.9, "L": 20, "inner_lr": 0.1, "noise": 1e-4}),
        Case("ReplicatedSGD", "ReplicatedSGD", 1e-2, {"momentum": 0.9}),  # of one replica: without their mean
        Case("Prodigy", "Prodigy", 1.0, ADAM | DISTANCE, measured=4, one_lr=True),
    )
}
