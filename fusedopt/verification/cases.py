"""The case table: one row per variant of every optimizer. It drives the tests and ``fusedopt verify``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fusedopt
from fusedopt.verification import references


@dataclass(frozen=True, eq=False)
class Case:
    """One variant of an optimizer, with weight decay on, and what it is compared with.

    Attributes:
        name: How reports call it.
        optimizer: The class's name in fusedopt.
        options: Constructor arguments.
        reference: Its textbook loop.
        oracle: ``package:Class`` of an independent implementation.
        exact: Relative error allowed in fp64 (torch keeps NAdam's product in fp32).
        signs: Whether a step is a sign, which may flip where it hangs on rounding.
    """

    name: str
    optimizer: str
    options: dict[str, Any]
    reference: Callable[..., Any]
    oracle: str
    exact: float = 1e-12
    signs: bool = False

    def build(self, params: Any, **more: Any) -> fusedopt.FusedOptimizer:
        """Our optimizer."""
        return getattr(fusedopt, self.optimizer)(params, **self.options, **more)


WD = {"weight_decay": 0.05}
BOUNDS = {"final_lr": 1e-3, "gamma": 0.01}  # both bounds, and neither, are met within 300 steps
CASES = (
    Case("SGD", "SGD", {"lr": 0.01, **WD}, references.sgd, "torch:SGD"),
    Case("SGD momentum", "SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, **WD}, references.sgd, "torch:SGD"),
    Case("SGD nesterov", "SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True, **WD}, references.sgd, "torch:SGD"),
    Case(
        "SGDW",
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "decoupled_weight_decay": True, **WD},
        references.sgd,
        "timm:SGDW",
    ),
    Case(
        "Adagrad",
        "Adagrad",
        {"lr_decay": 0.01, "initial_accumulator_value": 0.1, **WD},
        references.adagrad,
        "torch:Adagrad",
    ),
    Case("RMSprop", "RMSprop", {"lr": 0.001, **WD}, references.rmsprop, "torch:RMSprop"),
    Case("RMSprop momentum", "RMSprop", {"lr": 0.001, "momentum": 0.9, **WD}, references.rmsprop, "torch:RMSprop"),
    Case("RMSprop centered", "RMSprop", {"lr": 0.001, "centered": True, **WD}, references.rmsprop, "torch:RMSprop"),
    Case(
        "RMSprop both",
        "RMSprop",
        {"lr": 0.001, "centered": True, "momentum": 0.9, **WD},
        references.rmsprop,
        "torch:RMSprop",
    ),
    Case("Adam", "Adam", WD, references.adam, "torch:Adam"),
    Case("Adam amsgrad", "Adam", {"amsgrad": True, **WD}, references.adam, "torch:Adam"),
    Case("AdamW", "AdamW", WD, references.adam, "torch:AdamW"),
    Case("AdamW amsgrad", "AdamW", {"amsgrad": True, **WD}, references.adam, "torch:AdamW"),
    Case("NAdam", "NAdam", WD, references.nadam, "torch:NAdam", exact=1e-8),
    Case(
        "NAdam decoupled", "NAdam", {"decoupled_weight_decay": True, **WD}, references.nadam, "torch:NAdam", exact=1e-8
    ),
    Case("NAdamW", "NAdamW", WD, references.nadamw, "timm:NAdamW"),
    Case("RAdam", "RAdam", WD, references.radam, "torch:RAdam"),
    Case("RAdam decoupled", "RAdam", {"decoupled_weight_decay": True, **WD}, references.radam, "torch:RAdam"),
    Case("AdaBound", "AdaBound", {**BOUNDS, **WD}, references.adabound, "adabound:AdaBound"),
    Case("AMSBound", "AdaBound", {"amsbound": True, **BOUNDS, **WD}, references.adabound, "adabound:AdaBound"),
    Case("Lion", "Lion", WD, references.lion, "lion-pytorch:Lion", signs=True),
)
