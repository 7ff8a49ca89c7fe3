"""Muon, beside AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.aliases import Arguments, Group, ParamGroup, ParamsT, ProcessGroup, StateDict, Tensors, Values, is_group
from fusedopt.context import Context
from fusedopt.newton_schulz import Workspace
from fusedopt.optimizer import arguments
from fusedopt.optimizers.muon_stacks import is_matrix
from fusedopt.optimizers.muon_step import ADAMW, MUON, MuonLaunches
from fusedopt.optimizers.parts import InParts, tensor_of
from fusedopt.optimizers.two_launches import AFTER
from fusedopt.options import STEP, Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    BETAS,
    DECOUPLED,
    EPS,
    LR,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Rule,
    Scalars,
    State,
    States,
    bias_correction,
)
from fusedopt.stepper import Stepper

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUST_LR = (None, "original", "match_rms_adamw")
NS_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_STEPS = 99
ADAMW_DEFAULTS: ParamGroup = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
ADAMW_HYPER = {hyper.key: hyper for hyper in (LR, *BETAS, EPS, WEIGHT_DECAY)}


class MuonRule(Rule):
    """The three parts of a step, see two_launches.py: AdamW's; the momentum of matrices; what their function made."""

    name = "muon"
    hyper: Hypers = (Hyper("momentum"), Hyper("nesterov"), *BETAS, EPS)
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False), State("momentum_buffer"))
    scalars: Scalars = {"step": 0.0}
    decay = DECOUPLED
    replaces = "momentum_buffer"

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            one_minus_momentum=1 - h.momentum,
            ahead=h.momentum if h.nesterov else 1.0,
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=1 / bias_correction(h.beta1, s.step),
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        if "exp_avg" in state:
            m = torch.lerp(state["exp_avg"], g, c.one_minus_beta1)
            v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
            return c.m_scale * m / (c.root_scale * v.sqrt() + c.eps), {"exp_avg": m, "exp_avg_sq": v}
        if "momentum_buffer" in state:
            m = torch.lerp(state["momentum_buffer"], g, c.one_minus_momentum)
            return torch.lerp(g, m, c.ahead), {"momentum_buffer": m}
        return g, {}

    @classmethod
    def active_states(cls, group: Group) -> tuple[State, ...]:
        own = {ADAMW: cls.states[:2], MUON: cls.states[2:], AFTER: ()}
        return own[group["algorithm"]]

    @classmethod
    def variants(cls) -> tuple[tuple[str, ...], ...]:
        return ("exp_avg", "exp_avg_sq"), ("momentum_buffer",), ()

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        if group["algorithm"] == ADAMW:
            return None
        if group["algorithm"] not in (MUON, AFTER):
            return f"algorithm is {group['algorithm']!r}; it may be 'muon' or 'adamw'"
        if group["differentiable"]:
            return "differentiable=True is not for matrices that Muon steps, through whose function no gradient goes"
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        if not _are_three_numbers(coefficients):
            return f"ns_coefficients is {coefficients!r}; it must be three finite numbers"
        if isinstance(steps, bool) or not isinstance(steps, Integral) or not 0 <= int(steps) <= MOST_STEPS:
            return f"ns_steps is {steps!r}; it must be a whole number from 0 to {MOST_STEPS}"
        if group["adjust_lr_fn"] not in ADJUST_LR:
            return f"adjust_lr_fn is {group['adjust_lr_fn']!r}; it may be 'original', 'match_rms_adamw' or None"
        if group["ns_dtype"] not in NS_DTYPES:
            return f"ns_dtype is {group['ns_dtype']!r}; it may be a real floating point dtype, or None"
        return None


def _are_three_numbers(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(cast("Sequence[object]", value)) != 3:
        return False
    numbers = cast("Sequence[object]", value)
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)


class Muon(InParts):
    """Momentum made orthogonal, for matrices; AdamW for everything else, in the same optimizer and the same launches.

    Of a matrix: ``m <- momentum m + (1 - momentum) g``; ``u = momentum m + (1 - momentum) g`` with ``nesterov``, else
    m; ``o``: some steps of Newton-Schulz's iteration from ``u / max(|u|, eps)``, which bring its singular values near
    1; and ``p <- (1 - lr weight_decay) p - lr r o`` with ``r = sqrt(max(1, rows / columns))``. Parameters of more
    dimensions, such as those of convolutions, are matrices whose rows are slices of dimension 0.

    A group is stepped by what it has as ``algorithm``: "muon" or "adamw". One that has neither becomes one of its
    matrices and one of the rest, which takes learning rate, betas, eps and weight decay from ``adamw``; schedulers see
    two groups. Embeddings and output layers are matrices that AdamW should step: ``fusedopt.muon_groups(model)``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate of matrices; a float or a one-element tensor.
        weight_decay: Decay coefficient of matrices, multiplied by ``lr``.
        momentum: Decay rate of the momentum.
        nesterov: Whether the gradient is added to the momentum once more.
        ns_coefficients: Of the iteration ``X <- a X + b (X X^T) X + c (X X^T)^2 X``.
        eps: The least norm that is divided by; of AdamW's groups what it is there.
        ns_steps: How many iterations.
        adjust_lr_fn: What r is: "original" (also None), as above, or "match_rms_adamw", ``0.2 sqrt(max(rows,
            columns))``, with which learning rate and decay of AdamW suit matrices, too.
        adamw: Any of ``lr``, ``betas``, ``eps`` and ``weight_decay`` of what AdamW steps, where a group does not say
            them; torch's defaults of AdamW for others.
        ns_dtype: What the iteration is computed in; None for bfloat16, as its authors do, float64 of float64
            parameters, and float32 on CPUs that multiply it faster.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``. Matrices cannot be differentiable.

    Raises:
        ValueError: If a hyperparameter is outside its domain, or a group says "muon" of what is no real matrix.
        TypeError: If ``adamw`` has something else.

    Example:
        >>> groups = fusedopt.muon_groups(model)
        >>> optimizer = fusedopt.Muon(groups, lr=0.02, adamw={"lr": 3e-4, "betas": (0.9, 0.95)})

    Reference:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; "match_rms_adamw": Liu et al.,
        "Muon is scalable for LLM training", arXiv 2502.16982.
    """

    rule: type[Rule] = MuonRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Arguments | None = None,
        ns_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        cautious_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        taken = arguments({key: value for key, value in locals().items() if key != "adamw"})
        self._adamw: ParamGroup = _adamw(adamw)
        taken["defaults"]["betas"] = self._adamw["betas"]
        _check(taken["defaults"])
        super().__init__(params, **taken)

    def _parts(self, group: ParamGroup) -> list[ParamGroup]:
        """A group as those of the algorithms that its members take."""
        number, algorithm = len(self.param_groups), group.get("algorithm")
        adamw = _adamw(group.pop("adamw", None), self._adamw)
        if algorithm not in (None, ADAMW, MUON):
            raise ValueError(f"algorithm (group {number}) is {algorithm!r}; it may be 'muon', 'adamw' or None")
        fit = [is_matrix(tensor_of(member)) for member in group["params"]]
        for i, member in enumerate(group["params"]):
            if getattr(tensor_of(member), "_fsdp_flattened", False) and algorithm != ADAMW:
                raise ValueError(
                    f"parameter {i} of group {number} is a piece of tensors that FullyShardedDataParallel flattened, "
                    "in which nobody sees matrices; shard with fully_shard, or say algorithm='adamw' of its group"
                )
        if algorithm == MUON and not all(fit):
            self._refuse(group, number, fit.index(False))
        if algorithm is None and any(fit) and not all(fit):
            matrices, rest = ([m for m, f in zip(group["params"], fit, strict=True) if f == of] for of in (True, False))
            others = {key: value for key, value in group.items() if key not in ADAMW_HYPER}
            return [
                {**group, "params": matrices, "algorithm": MUON},
                {**others, **adamw, "params": rest, "algorithm": ADAMW},
            ]
        if algorithm == ADAMW or (algorithm is None and not any(fit) and fit):
            return [{**adamw, **group, "algorithm": ADAMW}]
        return [{**group, "algorithm": MUON}]

    def _refuse(self, group: Group, number: int, i: int) -> None:
        """Raise for what cannot be a matrix."""
        p = tensor_of(group["params"][i])
        if isinstance(p, Tensor):  # else torch says what it has to be
            raise ValueError(
                f"{checks.Label({}, number, i, p)} is no real matrix, which algorithm='muon' steps; say 'adamw', or "
                "nothing, of its group"
            )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state from here, or from ``torch.optim.Muon``, which counts no steps: then they begin again.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it does not fit: other groups, shapes, states or hyperparameters. Nothing has changed then.
        """
        state = state_dict.get("state", {})
        counted = {
            key: {STEP: torch.zeros(()), **its} if is_group(its) and "momentum_buffer" in its else its
            for key, its in state.items()
        }
        super().load_state_dict({**state_dict, "state": counted} if state else state_dict)

    def _get_ready(self) -> None:
        self._workspace = Workspace()
        super()._get_ready()

    def _stepper_of(self, context: Context) -> Stepper:
        return MuonLaunches(context, self._workspace)

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_adamw": self._adamw}


def _check(defaults: Group) -> None:
    """What matrices are told is right, also where there are none."""
    for hyper in (LR, WEIGHT_DECAY, EPS, Hyper("momentum")):
        checks.hyperparameter(hyper, 0, defaults, "")
    if conflict := MuonRule.conflict({**defaults, "algorithm": MUON, "differentiable": False}):
        raise ValueError(conflict)


def _adamw(given: Arguments | None, otherwise: ParamGroup = ADAMW_DEFAULTS) -> ParamGroup:
    """What AdamW's groups are told, where they do not say it."""
    if given is not None and not is_group(given):
        raise TypeError(f"adamw is {type(given).__name__}; it must be a dict, or None")
    asked = given or {}
    if unknown := asked.keys() - ADAMW_HYPER.keys():
        raise TypeError(f"adamw has {', '.join(sorted(map(str, unknown)))}; it may have {', '.join(ADAMW_HYPER)}")
    found = {**otherwise, **asked}
    for hyper in (LR, *BETAS, EPS, WEIGHT_DECAY):
        checks.hyperparameter(hyper, MuonRule.size_of(hyper), found, " of adamw")
    return found
