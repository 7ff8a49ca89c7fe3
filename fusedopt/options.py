"""What a param group can ask of the engines besides its rule: averages, noise in the gradients, storage.

They are options of every optimizer, and the same on every engine. A group has them as the tuples of here; a
``state_dict`` has plain ones, which anybody can load: ``("ema", 0.999)``, ``("lookahead", 5, 0.5)``,
``("gaussian", 0.01, 0.55, 0)``. Storage is described in fusedopt/storage.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fusedopt.aliases import Group, ParamGroup
from fusedopt.rule import Hyper, Rule, Scalar, State

AVERAGE, NOISE, CAUTIOUS = "average", "gradient_noise", "cautious_weight_decay"
STATE_DTYPE, MASTER = "state_dtype", "master"
RESCALE, EVERY, RESCALE_STEP = "rescale", "rescale_every", "rescale_step"
CHANNEL, TENSOR, ALL = RESCALES = ("channel", "tensor", "all")
STEP = "step"  # the scalar that counts

EIGHT_BIT = "8bit"
STATE_DTYPES = (None, torch.bfloat16, EIGHT_BIT)
MASTERS = (None, "fp32", "split", "stochastic")
StateDtype = torch.dtype | Literal["8bit"]
Master = Literal["fp32", "split", "stochastic"]

LARGEST_K = float(2**24)
LARGEST_SEED = 2**32 - 1


def _in_domain(kind: str, name: str, value: object, low: float, high: float) -> float | Tensor:
    """A number of Python's own, or a one-element tensor as it is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        number = float(value)
    elif not isinstance(value, bool) and isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else float(value)
    else:
        raise TypeError(f"{name} of {kind} is {value!r}; it must be a number or a one-element tensor")
    if not low <= number <= high:
        raise ValueError(f"{name} of {kind} is {value!r}; it must lie in [{low:g}, {high:g}]")
    return value if isinstance(value, Tensor) else number


class _EMA(NamedTuple):
    decay: float | Tensor


class _Lookahead(NamedTuple):
    k: int | Tensor
    alpha: float | Tensor


class _GradientNoise(NamedTuple):
    eta: float | Tensor
    gamma: float | Tensor
    seed: int


class EMA(_EMA):
    """An exponential moving average of the parameters.

    After a parameter's first step it is the parameter, then ``ema <- decay ema + (1 - decay) p`` after each step, as in
    ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(decay)``. The state is called ``ema``.

    Args:
        decay: In [0, 1].

    Raises:
        ValueError: If it does not lie there.
        TypeError: If it is no number.
    """

    __slots__ = ()

    def __new__(cls, decay: float | Tensor) -> EMA:
        """See the class."""
        return super().__new__(cls, _in_domain("EMA", "decay", decay, 0.0, 1.0))


class Lookahead(_Lookahead):
    """Slow weights, towards which the parameters are put back in every k-th step.

    They are the parameter before its first step; in every k-th step of a parameter
    ``slow <- slow + alpha (p - slow); p <- slow``. The state is called ``slow``.

    Args:
        k: Steps from one synchronisation to the next.
        alpha: How far the slow weights go, in [0, 1].

    Raises:
        ValueError: If something is outside of its domain.
        TypeError: If something is no number.

    Reference:
        Zhang, Lucas, Hinton and Ba, NeurIPS 2019.
    """

    __slots__ = ()

    def __new__(cls, k: int = 5, alpha: float | Tensor = 0.5) -> Lookahead:
        """See the class."""
        steps = _in_domain("Lookahead", "k", k, 1, LARGEST_K)
        if not float(steps).is_integer():
            raise ValueError(f"k of Lookahead is {k!r}; it must be a whole number")
        whole = steps if isinstance(steps, Tensor) else int(steps)
        return super().__new__(cls, whole, _in_domain("Lookahead", "alpha", alpha, 0.0, 1.0))


class GradientNoise(_GradientNoise):
    """Gaussian noise, added to the gradients after clipping, before weight decay and moments.

    Its variance is ``eta / (1 + t) ** gamma`` in step t of a parameter, counted from 0. It depends on the seed, the
    step, the parameter's place among all of the optimizer's and the element's in it; not on the engine or on how a
    DTensor is sharded.

    Args:
        eta: The variance in the first step.
        gamma: How fast it decays.
        seed: A whole number from 0 to 2**32 - 1.

    Raises:
        ValueError: If something is outside of its domain.
        TypeError: If something is no number.

    Reference:
        Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.
    """

    __slots__ = ()

    def __new__(cls, eta: float | Tensor, gamma: float | Tensor = 0.55, seed: int = 0) -> GradientNoise:
        """See the class."""
        kind = "GradientNoise"
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed of {kind} is {seed!r}; it must be a whole number")
        most = 3.4e38
        eta, gamma = _in_domain(kind, "eta", eta, 0.0, most), _in_domain(kind, "gamma", gamma, 0.0, most)
        return super().__new__(cls, eta, gamma, int(_in_domain(kind, "seed", seed, 0, LARGEST_SEED)))


Average = EMA | Lookahead
Kind = type[EMA] | type[Lookahead] | type[GradientNoise]

# By their names in a state dict.
_KINDS: dict[str, dict[str, Kind]] = {
    AVERAGE: {"ema": EMA, "lookahead": Lookahead},
    NOISE: {"gaussian": GradientNoise},
}
_SAY = {
    AVERAGE: "fusedopt.EMA(decay), fusedopt.Lookahead(k, alpha) or None",
    NOISE: "fusedopt.GradientNoise(eta, gamma, seed) or None",
}
DEFAULTS: dict[str, object] = {AVERAGE: None, NOISE: None, CAUTIOUS: False, STATE_DTYPE: None, MASTER: None}
STORAGE = (STATE_DTYPE, MASTER)
_DTYPE_NAMES = {str(torch.bfloat16): torch.bfloat16, "bfloat16": torch.bfloat16}  # as a state dict has them

# What the engines read of a group beside the rule's hyperparameters, by what asks for it.
HYPER: dict[type[object], tuple[Hyper, ...]] = {
    EMA: (Hyper("decay", AVERAGE, 0, high=1.0),),
    Lookahead: (Hyper("k", AVERAGE, 0, low=1.0, high=LARGEST_K), Hyper("alpha", AVERAGE, 1, high=1.0)),
    GradientNoise: (Hyper("eta", NOISE, 0), Hyper("gamma", NOISE, 1), Hyper("seed", NOISE, 2, high=LARGEST_SEED)),
}
STATES: dict[type[object], State] = {EMA: State("ema", exact=True), Lookahead: State("slow", exact=True)}


def settle(group: ParamGroup, where: str) -> None:
    """Bring a group's options into the form that engines read; those that are off are not in it.

    So what walks through the keys of groups, as checkpoints of torch.distributed do, finds those of torch's optimizers.

    Raises:
        TypeError: If one is of another kind.
        ValueError: If a number lies outside of its domain.
    """
    settled = {AVERAGE: _settled(AVERAGE, group, where), NOISE: _settled(NOISE, group, where)}
    cautious = group.get(CAUTIOUS, False)
    if not isinstance(cautious, bool):
        raise TypeError(f"{CAUTIOUS}{where} is {cautious!r}; it must be True or False")
    settled |= {CAUTIOUS: cautious, STATE_DTYPE: _state_dtype(group, where), MASTER: _master(group, where)}
    for key, value in settled.items():
        if value:
            group[key] = value
        else:
            group.pop(key, None)
    settle_rescale(group, where)


def settle_numbers(rule: type[Rule], group: ParamGroup) -> None:
    """Pairs that are tensors or arrays become tuples of their elements; arrays of one number lose their dimensions."""
    for hyper in (*rule.engine_hyper(), *rule.hyper, *rule.settings):
        value: object = group.get(hyper.key)
        if hyper.index >= 0 and isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
            group[hyper.key] = tuple(cast("Iterable[object]", value))
        elif isinstance(value, np.ndarray) and value.ndim and value.size == 1:
            group[hyper.key] = value.reshape(())


def _state_dtype(group: Group, where: str) -> StateDtype | None:
    value = group.get(STATE_DTYPE)
    value = _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value
    if value not in STATE_DTYPES:
        raise ValueError(f"{STATE_DTYPE}{where} is {value!r}; it may be None, torch.bfloat16 or '8bit'")
    return value


def _master(group: Group, where: str) -> Master | None:
    value = group.get(MASTER)
    if value not in MASTERS:
        raise ValueError(f"{MASTER}{where} is {value!r}; it may be None, 'fp32', 'split' or 'stochastic'")
    return value


def settle_rescale(group: ParamGroup, where: str) -> None:
    """The same for ``rescale``, see fusedopt/rescaling.py.

    Raises:
        TypeError, ValueError: For something else, or beside what cannot be done together.
    """
    kind, every = group.get(RESCALE), group.get(EVERY, 1)
    if kind is None:
        for key in (RESCALE, EVERY, RESCALE_STEP):
            group.pop(key, None)
        return
    if kind not in RESCALES:
        raise ValueError(f"{RESCALE}{where} is {kind!r}; it may be 'channel', 'tensor', 'all' or None")
    if isinstance(every, bool) or not isinstance(every, Integral):
        raise TypeError(f"{EVERY}{where} is {every!r}; it must be a whole number")
    if every < 1:
        raise ValueError(f"{EVERY}{where} is {every!r}; it must be at least 1")
    average = group.get(AVERAGE)
    if isinstance(average, Lookahead):
        raise ValueError(f"{RESCALE}{where} and Lookahead would each put the parameters somewhere; use one")
    if group.get("differentiable"):
        raise ValueError(f"{RESCALE}{where} is not differentiable")
    group.update({EVERY: int(every), RESCALE_STEP: int(group.get(RESCALE_STEP, 0))})


def _settled(key: str, group: Group, where: str) -> Average | GradientNoise | None:
    kinds: dict[str, Callable[..., Average | GradientNoise]] = {**_KINDS[key]}
    value = group.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, tuple(_KINDS[key].values())):
            return cast("Callable[..., Average | GradientNoise]", type(value))(*value)
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], str) and value[0] in kinds:
            return kinds[value[0]](*value[1:])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{key}{where}: {error}") from None
    raise TypeError(f"{key}{where} is {value!r}; it must be {_SAY[key]}")


def plain(group: Group) -> ParamGroup:
    """A group whose options are of Python's own types; those that are off are left out, as if nobody knew them."""
    saved = {key: value for key, value in group.items() if value or key not in DEFAULTS}
    for key, kinds in _KINDS.items():
        for name, kind in kinds.items():
            if isinstance(saved.get(key), kind):
                saved[key] = (name, *saved[key])
    if isinstance(saved.get(STATE_DTYPE), torch.dtype):
        saved[STATE_DTYPE] = str(saved[STATE_DTYPE]).removeprefix("torch.")
    return saved


def are_asked(group: Group) -> bool:
    """Whether a group asks for any."""
    return any(group.get(key) for key in DEFAULTS)


def numbers(groups: Sequence[Group], group: Group) -> list[tuple[Hyper | None, int]]:
    """Where the engines find a group's numbers, and of how many each is one; None for 0.

    They are the average's two, a decay or a period and alpha, then the noise's three; none at all where none of the
    groups that are stepped together asks for any.
    """
    if not any(map(are_asked, groups)):
        return []
    found: list[tuple[Hyper | None, int]] = []
    for key, size in ((AVERAGE, 2), (NOISE, 3)):
        own = HYPER.get(_kind(group, key), ())
        found += [(h, len(own)) for h in own] + [(None, 0)] * (size - len(own))
    return found


def _kind(group: Group, key: str) -> type[object]:
    value: object = group.get(key)
    return type(value)


def average_state(group: Group) -> State | None:
    """The state that a group's average is kept in."""
    return STATES.get(_kind(group, AVERAGE))


def draws(group: Group) -> bool:
    """Whether a group's step takes random numbers."""
    return group.get(NOISE) is not None or group.get(MASTER) == "stochastic"


def counts(rule: type[Rule], group: Group) -> bool:
    """Whether the engine has to count a parameter's steps, because the rule does not."""
    needs = isinstance(group.get(AVERAGE), Lookahead) or draws(group)
    return needs and STEP not in rule.scalars


def states_of(rule: type[Rule], group: Group) -> tuple[State, ...]:
    """All states that a parameter of a group has."""
    average = average_state(group)
    return rule.active_states(group) + ((average,) if average else ())


def scalars_of(rule: type[Rule], group: Group) -> dict[str, Scalar]:
    """All scalars that it has, and their initial values."""
    return {STEP: 0.0, **rule.scalars} if counts(rule, group) else rule.scalars
