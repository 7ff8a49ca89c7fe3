"""The engine's options beside every rule: textbook loops around a rule's textbook loop, and their cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import fusedopt
from fusedopt import noise
from fusedopt.aliases import Arguments, Memory
from fusedopt.verification.cases import CASES, Case

Loop = Callable[[Tensor, Tensor, Memory, Memory], Tensor]

STEPS = 60  # of these cases: what options do they do in few
ETA = 0.01  # visible beside the trajectory's gradients


def ema(loop: Loop) -> Loop:
    """The average of torch.optim.swa_utils.AveragedModel."""

    def step(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
        p, decay = loop(p, g, x, h), h["average"].decay
        x["ema"] = decay * x["ema"] + (1 - decay) * p if "ema" in x else p
        return p

    return step


def lookahead(loop: Loop) -> Loop:
    """Zhang et al. 2019, algorithm 1."""

    def step(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
        x.setdefault("slow", p)
        x["inner"] = x.get("inner", 0) + 1
        p = loop(p, g, x, h)
        if x["inner"] % h["average"].k == 0:
            p = x["slow"] = x["slow"] + h["average"].alpha * (p - x["slow"])
        return p

    return step


def gradient_noise(loop: Loop) -> Loop:
    """Neelakantan et al. 2015, equation 1."""

    def step(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
        (eta, gamma, seed), t = h["gradient_noise"], x.get("drawn", 0)
        x["drawn"] = t + 1
        drawn = noise.normal(noise.elements(p), x["number"], t, (seed, noise.GRADIENT))
        return loop(p, g + (math.sqrt(eta / (1 + t) ** gamma) * drawn).to(p.dtype), x, h)

    return step


def cautious(loop: Loop) -> Loop:
    """Chen et al. 2025, algorithm 1: a step without decay, which is the same from anywhere, and decay along it.

    Loops that must know what decays and how much find it as ``decaying``.
    """

    def step(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
        decaying = p, h["weight_decay"]
        update = -loop(torch.zeros_like(p), g, x, {**h, "weight_decay": 0.0, "decaying": decaying})
        return p - update - h["lr"] * h["weight_decay"] * torch.where(update * p >= 0, p, torch.zeros_like(p))

    return step


OPTIONS: tuple[tuple[str, Callable[[Loop], Loop], Arguments, tuple[str, ...]], ...] = (
    ("EMA", ema, {"average": fusedopt.EMA(0.9)}, ("ema",)),
    ("Lookahead", lookahead, {"average": fusedopt.Lookahead(5, 0.5)}, ("slow",)),
    ("noise", gradient_noise, {"gradient_noise": fusedopt.GradientNoise(ETA, seed=7)}, ()),
    ("cautious", cautious, {"cautious_weight_decay": True}, ()),
)


def _with(case: Case, name: str, around: Callable[[Loop], Loop], asked: Memory, results: tuple[str, ...]) -> Case:
    assert case.reference
    return replace(
        case,
        name=f"{case.name}, {name}",
        options={**case.options, **asked},
        oracle="none:",
        reference=around(case.reference),
        alone=False,
        steps=STEPS,
        results=case.results + results,
    )


def _fits(case: Case, asked: Memory) -> bool:
    """Whether an optimizer takes an option: cautious decay must be decoupled."""
    one = case.build([torch.nn.Parameter(torch.zeros(()))])
    return "cautious_weight_decay" not in asked or one.rule.is_decoupled(one.param_groups[0])


OPTION_CASES = tuple(
    _with(case, *option)
    for case in CASES
    if case.reference and not case.together
    for option in OPTIONS
    if _fits(case, option[2])
)
