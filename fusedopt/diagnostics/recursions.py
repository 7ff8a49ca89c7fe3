"""How an optimizer's momentum weighs past gradients, in the steady state: what the memory terms are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fusedopt.optimizers as ours
from fusedopt import checks
from fusedopt.aliases import Group
from fusedopt.diagnostics.arguments import members
from fusedopt.options import AVERAGE, CAUTIOUS, NOISE, RESCALE, Lookahead

SGD, ADAM, LION = "SGD", "Adam", "Lion"
# Which recursion a class has, and whether its numerator has a Nesterov step; classes of users may step otherwise.
CLASSES: dict[type[torch.optim.Optimizer], tuple[str, bool]] = {
    ours.SGD: (SGD, False),
    ours.Adam: (ADAM, False),
    ours.AdamW: (ADAM, False),
    ours.NAdamW: (ADAM, True),
    ours.Lion: (LION, False),
    torch.optim.SGD: (SGD, False),
    torch.optim.Adam: (ADAM, False),
    torch.optim.AdamW: (ADAM, False),
}
DECOUPLED = (ours.AdamW, ours.NAdamW, ours.Lion, torch.optim.AdamW)


@dataclass(frozen=True)
class Recursion:
    """Momentum of one param group, its transients over, with the gradient g and the force F, a step over ``lr``.

    SGD: ``F = gain g + decay p``, ``M = first H F``. Adam: ``F = g/(|g|+eps) + decay p`` and
    ``M = (first/(|g|+eps) - second |g|/(|g|+eps)^2) H F``. Lion-K: ``F = grad K(g) + decay p``,
    ``M = first hess K(g) H F``.

    Attributes:
        kind: "SGD", "Adam" or "Lion".
        first: Steps by which the first moment's gradient is behind, weighed: sum of ``k w_k`` over lags k.
        second: The same of Adam's second moment; 0 for others.
        gain: The sum of SGD's weights, by which momentum multiplies the learning rate; 1 for others.
        lr: Learning rate.
        decay: Of decoupled weight decay.
        coupled: Of weight decay that is part of the gradient.
        eps: Adam's.
    """

    kind: str
    first: float
    second: float = 0.0
    gain: float = 1.0
    lr: float = 0.0
    decay: float = 0.0
    coupled: float = 0.0
    eps: float = 0.0

    def coefficient(self) -> float:
        """The coefficient of memory, as ``memory_coefficient`` documents it."""
        return self.second - self.first if self.kind == ADAM else self.gain * self.first


def age(beta: float) -> float:
    """Mean age in steps of what a moving average is of, ``beta / (1 - beta)``."""
    return beta / (1 - beta)


def of_betas(betas: object) -> Recursion:
    """Adam's, of a pair of betas."""
    beta1, beta2 = _betas(betas, "")
    return Recursion(ADAM, age(beta1), age(beta2))


def of_optimizer(optimizer: torch.optim.Optimizer) -> list[Recursion]:
    """Those of an optimizer's param groups.

    Raises:
        TypeError: If the derivation is not of this class.
        ValueError: If it is not of an option that a group has.
    """
    groups = enumerate(optimizer.param_groups)
    return [of_group(type(optimizer), group, f" of group {index}") for index, group in groups]


def of_group(known: type[torch.optim.Optimizer], group: Group, where: str) -> Recursion:
    """That of one param group of a class; messages say where it is."""
    if known not in CLASSES:
        raise TypeError(
            f"optimizer is {known.__module__}.{known.__qualname__}; the memory of momentum is derived for SGD, Adam, "
            "AdamW, NAdamW and Lion of fusedopt, and SGD, Adam and AdamW of torch.optim (fusedopt.fuse turns others' "
            "into ours)"
        )
    kind, is_nesterov = CLASSES[known]
    _refuse(group, where)
    lr, decay = (checks.number(group[key], key, where) for key in ("lr", "weight_decay"))
    is_decoupled = known in DECOUPLED or bool(group.get("decoupled_weight_decay"))
    gain, first, second = _lags(kind, is_nesterov, group, where)
    eps = checks.number(group["eps"], "eps", where) if kind == ADAM else 0.0
    decoupled, coupled = (decay, 0.0) if is_decoupled else (0.0, decay)
    return Recursion(kind, first, second, gain, lr, decoupled, coupled, eps)


def _lags(kind: str, is_nesterov: bool, group: Group, where: str) -> tuple[float, float, float]:
    """The sum of weights, and the mean lags of the first and second moment."""
    if kind == SGD:
        return (*_momentum(group, where), 0.0)
    beta1, beta2 = _betas(group["betas"], where)
    if kind == LION:
        return 1.0, beta1 / (1 - beta2), 0.0
    return 1.0, (beta1 if is_nesterov else 1.0) * age(beta1), age(beta2)


def _momentum(group: Group, where: str) -> tuple[float, float]:
    """Of SGD: sums of ``w_k`` and ``k w_k``, with ``w_k = (1-d) mu^k``; Nesterov: 1 + mu first, then ``mu^(k+1)``."""
    mu, dampening = (checks.number(group[key], key, where) for key in ("momentum", "dampening"))
    if not 0 <= mu < 1:
        raise ValueError(f"momentum{where} is {mu!r}; memory is finite for momentum in [0, 1)")
    if mu == 0:
        return 1.0, 0.0
    if group["nesterov"]:
        return 1 / (1 - mu), mu**2 / (1 - mu) ** 2
    return (1 - dampening) / (1 - mu), (1 - dampening) * mu / (1 - mu) ** 2


def _betas(betas: object, where: str) -> tuple[float, float]:
    """Both betas, each in [0, 1)."""
    if (pair := members(betas)) is None:
        raise TypeError(f"betas{where} is {type(betas).__name__}; it must be a pair of numbers in [0, 1)")
    values = [checks.number(beta, "beta", where) for beta in pair]
    if len(values) != 2 or not all(0 <= beta < 1 for beta in values):
        raise ValueError(f"betas{where} is {betas!r}; it must be a pair of numbers in [0, 1)")
    return values[0], values[1]


def _refuse(group: Group, where: str) -> None:
    """What makes a step another than the derivation's."""
    reasons = {
        "amsgrad": "a running maximum is no average, and has no age",
        "maximize": "the terms are of a loss that is minimised",
        CAUTIOUS: "decay is not smooth then",
        NOISE: "the terms are of gradients without noise",
        RESCALE: "weights are moved after the step",
    }
    for key, reason in reasons.items():
        if group.get(key):
            raise ValueError(f"{key}{where} is {group[key]!r}; the memory of momentum is not derived for it: {reason}")
    average = group.get(AVERAGE)
    if isinstance(average, Lookahead):
        raise ValueError(f"{AVERAGE}{where} is {average!r}; the memory of momentum is not derived for Lookahead")
