"""The case table: one row per variant of every optimizer. It drives the tests and ``fusedopt verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.aliases import Arguments
from fusedopt.verification import joint_references, references


@dataclass(frozen=True, eq=False)
class Case:
    """One variant of an optimizer, with weight decay on, and what it is compared with.

    Attributes:
        name: How reports call it.
        optimizer: The class's name in fusedopt.
        options: Constructor arguments.
        oracle: ``package:Class`` of an independent implementation; ``none:Class`` where there is none.
        reference: Its textbook loop, which stands in where the oracle is not installed.
        theirs: Constructor arguments of the oracle that are not ours.
        alone: Whether the oracle has one step count for all parameters, so that each gets an oracle of its own.
        exact: Relative error allowed in fp64 (scalars such as NAdam's product are fp32).
        signs: Whether a step is the sign of a sum, which may flip where it hangs on rounding.
        steps: How many are compared.
        results: States that are of use in themselves, and compared as parameters are.
        together: Whether the textbook loop steps all tensors at once: it is given lists, and the losses of samples.
        flat: States that the oracle keeps as vectors.
        replicas: How many of each tensor are stacked; 1 for the tensor itself.
    """

    name: str
    optimizer: str
    options: Arguments
    oracle: str
    reference: Callable[..., Any] | None = None
    theirs: Arguments = field(default_factory=lambda: {})
    alone: bool = False
    exact: float = 1e-12
    signs: bool = False
    steps: int = 300
    results: tuple[str, ...] = ()
    together: bool = False
    flat: tuple[str, ...] = ()
    replicas: int = 1

    def build(self, params: Iterable[Tensor], **more: object) -> fusedopt.FusedOptimizer:
        """Our optimizer."""
        return getattr(fusedopt, self.optimizer)(params, **self.options, **more)


WD = {"weight_decay": 0.05}
LARS = {"lr": 0.5, "trust_coefficient": 0.01, **WD}
TIMM_LARS = {"trust_coeff": 0.01}
BOUNDS = {"final_lr": 1e-3, "gamma": 0.01}  # both bounds, and neither, are met within 300 steps
PRODUCT: Arguments = {"bias_correction": "product", **WD}
FREE: Arguments = {"warmup_steps": 30, "r": 0.5, **WD}
# d goes on growing for all 300 steps.
LIMITED: Arguments = {"safeguard_warmup": True, "growth_rate": 1.02, "beta3": 0.99}
FLAT = ("s", "p0")  # of prodigyopt
MUON: Arguments = {"adamw": WD, "ns_dtype": torch.float64, **WD}
# Damping that is seen beside the blocks, of which most elements of the matrix's are made of few steps.
BLOCKS: Arguments = {"lr": 0.01, "damping": 0.3, "inverse_every": 7, **WD}
# The resume is inside of a loop, and noise is seen beside gradients.
LOOPS: Arguments = {"L": 9, "inner_lr": 0.02, "gamma0": 0.3, "gamma1": 0.05, "noise": 0.05, "seed": 3, **WD}
REPLICATED: Arguments = {"lr": 0.01, "replicas": 3, "gamma0": 0.5, "gamma1": 0.005, **WD}
CASES = (
    Case("SGD", "SGD", {"lr": 0.01, **WD}, "torch:SGD", references.sgd),
    Case("SGD momentum", "SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, **WD}, "torch:SGD", references.sgd),
    Case("SGD nesterov", "SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True, **WD}, "torch:SGD", references.sgd),
    Case(
        "SGDW",
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "decoupled_weight_decay": True, **WD},
        "timm:SGDW",
        references.sgd,
    ),
    Case(
        "Adagrad",
        "Adagrad",
        {"lr_decay": 0.01, "initial_accumulator_value": 0.1, **WD},
        "torch:Adagrad",
        references.adagrad,
    ),
    Case("RMSprop", "RMSprop", {"lr": 0.001, **WD}, "torch:RMSprop", references.rmsprop),
    Case("RMSprop momentum", "RMSprop", {"lr": 0.001, "momentum": 0.9, **WD}, "torch:RMSprop", references.rmsprop),
    Case("RMSprop centered", "RMSprop", {"lr": 0.001, "centered": True, **WD}, "torch:RMSprop", references.rmsprop),
    Case(
        "RMSprop both",
        "RMSprop",
        {"lr": 0.001, "centered": True, "momentum": 0.9, **WD},
        "torch:RMSprop",
        references.rmsprop,
    ),
    Case("Adam", "Adam", WD, "torch:Adam", references.adam),
    Case("Adam amsgrad", "Adam", {"amsgrad": True, **WD}, "torch:Adam", references.adam),
    Case("Adam product", "Adam", PRODUCT, "none:Adam", references.adam_product, exact=1e-6),
    Case(
        "AdamW product amsgrad",
        "AdamW",
        {"amsgrad": True, **PRODUCT},
        "none:AdamW",
        references.adam_product,
        exact=1e-6,
    ),
    Case("AdamW", "AdamW", WD, "torch:AdamW", references.adam),
    Case("AdamW amsgrad", "AdamW", {"amsgrad": True, **WD}, "torch:AdamW", references.adam),
    Case("NAdam", "NAdam", WD, "torch:NAdam", references.nadam, exact=1e-8),
    Case(
        "NAdam decoupled", "NAdam", {"decoupled_weight_decay": True, **WD}, "torch:NAdam", references.nadam, exact=1e-8
    ),
    Case("NAdamW", "NAdamW", WD, "timm:NAdamW", references.nadamw),
    Case("RAdam", "RAdam", WD, "torch:RAdam", references.radam),
    Case("RAdam decoupled", "RAdam", {"decoupled_weight_decay": True, **WD}, "torch:RAdam", references.radam),
    Case("AdaBound", "AdaBound", {**BOUNDS, **WD}, "adabound:AdaBound", references.adabound),
    Case("AMSBound", "AdaBound", {"amsbound": True, **BOUNDS, **WD}, "adabound:AdaBound", references.adabound),
    Case("Adamax", "Adamax", WD, "torch:Adamax", references.adamax),
    Case("Adadelta", "Adadelta", WD, "torch:Adadelta", references.adadelta),
    # Averaging starts within the shortest run, and steps are to be seen in half precision.
    Case(
        "ASGD",
        "ASGD",
        {"lr": 0.1, "lambd": 0.02, "t0": 10.0, **WD},
        "torch:ASGD",
        references.asgd,
        results=("ax",),
    ),
    # Both bounds are met. No sum is rounded before its sign is taken: there is no weight decay.
    Case("Rprop", "Rprop", {"step_sizes": (1e-3, 0.05)}, "torch:Rprop", references.rprop),
    Case(
        "AdEMAMix",
        "AdEMAMix",
        {"alpha": 5.0, **WD},
        "pytorch-optimizer:AdEMAMix",
        references.ademamix,
        {"weight_decouple": True},
        alone=True,
    ),
    Case(
        "AdEMAMix warmups",
        "AdEMAMix",
        {"alpha": 5.0, "alpha_warmup": 200, "beta3_warmup": 100, **WD},
        "none:AdEMAMix",
        references.ademamix,
    ),
    Case("ADOPT", "ADOPT", WD, "timm:Adopt", references.adopt),
    Case(
        "ADOPT decoupled",
        "ADOPT",
        {"decoupled_weight_decay": True, **WD},
        "timm:Adopt",
        references.adopt,
        {"decoupled": True},
    ),
    Case("Adan", "Adan", WD, "timm:Adan", references.adan, alone=True),
    Case("Adan no_prox", "Adan", {"no_prox": True, **WD}, "timm:Adan", references.adan, alone=True),
    # A matrix, and vectors by AdamW. The matrix function is computed in double; what is less has tests of its own.
    Case("Muon", "Muon", MUON, "none:Muon", references.muon),
    Case(
        "Muon match_rms_adamw",
        "Muon",
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", **MUON},
        "none:Muon",
        references.muon,
    ),
    Case("Lion", "Lion", WD, "lion-pytorch:Lion", references.lion, signs=True),
    Case("LAMB", "LAMB", WD, "timm:Lamb", references.lamb, theirs={"max_grad_norm": None}, alone=True),
    Case(
        "LAMB always adapting",
        "LAMB",
        {"weight_decay": 0.0, "always_adapt": True},
        "timm:Lamb",
        references.lamb,
        theirs={"max_grad_norm": None},
        alone=True,
    ),
    Case("LARS", "LARS", LARS, "timm:Lars", references.lars, theirs=TIMM_LARS),
    Case("LARS nesterov", "LARS", {"nesterov": True, **LARS}, "timm:Lars", references.lars, theirs=TIMM_LARS),
    Case("AMSGD", "AMSGD", {"lr": 0.05, "scope": "tensor", **WD}, "none:AMSGD", references.amsgd),
    Case("AMAdamW", "AMAdamW", WD, "none:AMAdamW", references.amadamw, exact=1e-9),
    Case("AdamP", "AdamP", {"delta": 0.3, **WD}, "adamp:AdamP", references.adamp),
    Case("AdamP in channels", "AdamP", {"delta": 2.5, "nesterov": True, **WD}, "adamp:AdamP", references.adamp),
    Case("SGDP", "SGDP", {"lr": 0.01, "momentum": 0.9, "delta": 2.5, **WD}, "adamp:SGDP", references.sgdp),
    Case(
        "SGDP nesterov",
        "SGDP",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "delta": 0.3, **WD},
        "adamp:SGDP",
        references.sgdp,
    ),
    # Rates that are gone through in the gate's steps, and z, which is what is stepped.
    Case("ScheduleFreeAdamW", "ScheduleFreeAdamW", FREE, "none:", references.schedule_free, exact=1e-6, results=("z",)),
    Case(
        "ScheduleFreeSGD",
        "ScheduleFreeSGD",
        {"lr": 0.01, **FREE},
        "none:",
        references.schedule_free,
        exact=1e-6,
        results=("z",),
    ),
    # From a d0 whose steps are seen beside rounding.
    *(
        Case(
            name,
            "Prodigy",
            {**options, **WD},
            "prodigyopt:Prodigy",
            joint_references.prodigy,
            exact=1e-6,
            together=True,
            flat=FLAT,
        )
        for name, options in (
            ("Prodigy", {"d0": 1e-3}),
            ("Prodigy coupled", {"d0": 1e-2, "decouple": False, "use_bias_correction": True}),
            ("Prodigy limited", {"d0": 1e-3, **LIMITED}),
        )
    ),
    Case("KoalaV", "KoalaV", WD, "none:KoalaV", joint_references.koalav, exact=1e-5, together=True),
    Case(
        "KoalaV online",
        "KoalaV",
        {"r": "online", "match_reference": True, **WD},
        "none:KoalaV",
        joint_references.koalav,
        exact=1e-5,
        together=True,
    ),
    Case("KoalaM", "KoalaM", {"r": "online", **WD}, "none:KoalaM", joint_references.koalam, exact=1e-5, together=True),
    Case("SWATS", "SWATS", {"scope": "tensor", **WD}, "none:SWATS", references.swats, exact=1e-5),
    Case(
        "SWATS switching", "SWATS", {"scope": "tensor", "tol": 1e-3, **WD}, "none:SWATS", references.swats, exact=1e-5
    ),
    Case("MBF", "MBF", BLOCKS, "none:", references.mbf, exact=1e-9),
    *(
        Case(name, "EntropySGD", {**options, **LOOPS}, "none:", joint_references.entropy_sgd, together=True)
        for name, options in (
            ("EntropySGD", {"momentum": 0.0}),
            ("EntropySGD momentum", {"nesterov": False}),
            ("EntropySGD inner momentum", {"momentum": 0.0, "inner_momentum": 0.5}),
            ("EntropySGD both", {"inner_momentum": 0.5}),
        )
    ),
    *(
        Case(
            name,
            "ReplicatedSGD",
            {**options, **REPLICATED},
            "none:",
            joint_references.replicated_sgd,
            together=True,
            replicas=3,
        )
        for name, options in (
            ("ReplicatedSGD", {}),
            ("ReplicatedSGD momentum", {"momentum": 0.9, "dampening": 0.3}),
            ("ReplicatedSGD nesterov", {"momentum": 0.9, "nesterov": True}),
        )
    ),
    Case("NSGD", "NSGD", {"lr": 0.01, "dampening": 0.3, **WD}, "torch:SGD", references.sgd),
    Case("NSGD plain", "NSGD", {"lr": 0.01, "momentum": 0.0, **WD}, "torch:SGD", references.sgd),
    Case("LARS plain", "LARS", {"momentum": 0.0, **LARS}, "timm:Lars", references.lars, theirs=TIMM_LARS),
)
