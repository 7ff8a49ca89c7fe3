"""What a rule is: the mathematics of one optimizer on values.

A rule knows no tensor of the optimizer, no dtype and no engine. It has names (the same in every
engine and in ``state_dict``), and two functions: ``prepare``, once per step for tensors whose steps
advance together, in double precision, and ``direction``, elementwise. The engine owns the order of
everything else: unscale, clip, maximize, coupled L2, *rule*, decoupled decay, ``p -= lr * d`` or ``p -= d``.

A rule that must know sums before it can step has two functions more: ``measure``, elementwise, whose
values are added up, and ``finish``, in double precision, which puts what follows from the sums into
the coefficients. They are added up over segments, which are tensors or slices of them, and those of a
scope: where ``finish`` looks at a segment, it is told of both.

===========  =======================================  ============================================
scope        segments                                 over what ``finish`` is told the whole
===========  =======================================  ============================================
"tensor"     tensors                                  the same tensor
"channel"    slices of dimension 0; tensors of fewer  their tensor
             than two dimensions are one segment
"group"      tensors                                  all of a param group
"all"        tensors                                  all of the optimizer
===========  =======================================  ============================================

Only tensors with a gradient in the step are added up. Where ranks have parts of a tensor, or other
tensors of a scope, the sums are those of the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import product

from torch import Tensor

from fusedopt.aliases import Group, Tensors, Values

Scalar = float | str | Callable[[Tensor], float]

# A float32 counter stops counting here; it is then replaced by a float64 one.
LAST_FLOAT_STEP = 2**24


@dataclass(frozen=True, slots=True)
class Hyper:
    """A hyperparameter: its name, where it stands in a param group, and what it may be."""

    name: str
    key: str = ""  # in the group; the name if empty
    index: int = -1  # in the group's tuple, if it is one
    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    infinite: bool = False  # whether infinity is in its domain, as of a limit that is none
    whole: bool = False  # whether it must be a whole number

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)

    @property
    def label(self) -> str:
        """How users write it."""
        return f"{self.key}[{self.index}]" if self.index >= 0 else self.key

    @property
    def domain(self) -> str:
        """The interval in which it must lie, for messages."""
        left, right = "(" if self.low_open else "[", ")" if self._is_open_above else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    @property
    def closed_domain(self) -> tuple[float, float]:
        """The smallest and the largest double that is allowed."""
        low = math.nextafter(self.low, math.inf) if self.low_open else self.low
        return low, math.nextafter(self.high, -math.inf) if self._is_open_above else self.high

    @property
    def _is_open_above(self) -> bool:
        return self.high_open or (self.high == math.inf and not self.infinite)

    def of(self, group: Group) -> float | Tensor:
        """The value as the group has it: a number, or a one-element tensor."""
        value = group[self.key]
        return value[self.index] if self.index >= 0 else value


PARAM = "<param>"  # what a state is at first that is a copy of the parameter then; no group has such a key


@dataclass(frozen=True, slots=True)
class State:
    """A state tensor, shaped like the parameter."""

    name: str
    when: str = ""  # exists only while this hyperparameter or flag of the group is truthy
    init: str | float = 0.0  # its initial value, the key of the group's, or PARAM
    signed: bool = True  # whether it can be negative
    exact: bool = False  # whether it must keep all that float32 holds


# Of a rule's attributes, for those who state types.
Hypers = tuple[Hyper, ...]
States = tuple[State, ...]
Scalars = dict[str, Scalar]
Names = tuple[str, ...]
Score = Callable[[Values, Values], float]

LR = Hyper("lr")
WEIGHT_DECAY = Hyper("weight_decay")
BETAS = (
    Hyper("beta1", "betas", 0, high=1.0, high_open=True),
    Hyper("beta2", "betas", 1, high=1.0, high_open=True),
)
THREE_BETAS = (*BETAS, Hyper("beta3", "betas", 2, high=1.0, high_open=True))
EPS = Hyper("eps")


# What a rule says of weight decay, if it does not name a flag; no group has such keys.
COUPLED = "<coupled>"  # L2: added to the gradient
DECOUPLED = "<decoupled>"  # p *= 1 - lr * weight_decay
RULE = "<rule>"  # the rule's direction has it, or there is none


class StepScale(Enum):
    """What the engine multiplies a direction by."""

    LR = "lr"
    ONE = "one"


class Rule(ABC):
    """Base of all rules; see the module's text.

    Attributes:
        name: The same in C++ and Triton.
        hyper: What ``prepare`` reads. ``lr`` and ``weight_decay`` are the engine's; it may read them, too.
        settings: What only the optimizer reads; checked like the others.
        states: State tensors, named as in ``torch.optim``.
        scalars: 0-dim states and their initial values: numbers, keys of the group, or functions of the parameter.
            The first is ``step``, and the engine advances it before ``prepare`` sees it.
        measures: Names of what ``measure`` adds up; none for most rules.
        scopes: Over what sums can be taken; the first, unless the optimizer is constructed with another.
        epilogue: Names of what ``conclude`` adds up while it steps. They are scalars, and each has, after a
            step, the sum over the scope.
        shared: Scalars that a scope's parameters have in common, also those without a gradient. They are
            advanced by themselves, hyperparameters and what ``finish`` is told of the scope alone.
        decay: COUPLED, DECOUPLED, RULE, or the group's flag that says whether weight decay is decoupled.
        step_scale: Whether the engine subtracts ``lr * d`` or ``d``; the same in C++ and Triton.
        replaces: A state, if any. A parameter that has it is not stepped: what ``direction`` returns is its new value,
            without decay, and the old one is not read. For what a step writes besides parameters.
        sparse: Whether gradients may be sparse; see ``rests``.
    """

    name: str
    hyper: Hypers = ()
    settings: Hypers = ()
    states: States = ()
    scalars: Scalars = {}
    decay: str = "decoupled_weight_decay"
    step_scale: StepScale = StepScale.LR
    replaces: str = ""
    measures: Names = ()
    scopes: Names = ("tensor",)
    epilogue: Names = ()
    shared: Names = ()
    sparse: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.scalars and next(iter(cls.scalars)) != "step":
            raise TypeError(f"the first of {cls.__name__}.scalars is {next(iter(cls.scalars))!r}; it must be 'step'")

    @staticmethod
    @abstractmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        """Coefficients of one step.

        Args:
            h: Hyperparameters by name.
            s: Scalars by name, ``step`` already advanced; may be changed.
            new_state: Whether the state was created for this step.
        """

    @staticmethod
    @abstractmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        """``d`` of the step, see ``step_scale`` and ``replaces``, and the new state. Changes none of its arguments."""

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        """What is to be added up before the step, in the order of ``measures``. Changes none of its arguments."""
        raise NotImplementedError("a rule with `measures` has measure(p, g, state, c)")

    score: Score | None = None
    """``score(c, m)``: a number of a segment, whose maximum over the scope ``finish`` is told; None without."""

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        """What follows from the sums.

        Args:
            c: Coefficients, as ``prepare`` made them; to be changed.
            s: Scalars by name, after ``prepare``; may be changed, where the scope is not "channel" or by what
                is told of the scope.
            m: Sums over the segment by name; ``m.whole``: those over the scope; ``m.largest``: of the scores there.
        """
        raise NotImplementedError("a rule that measures has finish(c, s, m)")

    @staticmethod
    def conclude(p: Tensor, g: Tensor, d: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        """What is to be added up after the step, in the order of ``epilogue``; ``p`` and ``state`` are after it."""
        raise NotImplementedError("a rule with an `epilogue` has conclude(p, g, d, state, c)")

    @classmethod
    def has_sums(cls) -> bool:
        """Whether anything is added up besides the gradients' norm."""
        return bool(cls.measures or cls.epilogue)

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        """What is wrong with a group's options taken together; None if nothing."""
        return None

    @classmethod
    def rests(cls, group: Group) -> bool:
        """Whether elements without decay whose gradient is 0 stay as they are, and their states too."""
        return False

    @classmethod
    def active_states(cls, group: Group) -> tuple[State, ...]:
        """The states that a group's flags ask for."""
        return tuple(s for s in cls.states if not s.when or group[s.when])

    @classmethod
    def switches(cls) -> tuple[str, ...]:
        """Group keys whose truth decides which states there are."""
        return tuple(dict.fromkeys(s.when for s in cls.states if s.when))

    @classmethod
    def variants(cls) -> tuple[tuple[str, ...], ...]:
        """The sets of states that parameters can have, by their names."""
        keys = cls.switches()
        settings = [dict(zip(keys, on, strict=True)) for on in product((False, True), repeat=len(keys))]
        return tuple(tuple(s.name for s in cls.active_states(setting)) for setting in settings)

    @classmethod
    def size_of(cls, hyper: Hyper) -> int:
        """Of how many numbers of the group's tuple a hyperparameter is one; 0 if it is none of a tuple."""
        return 1 + max(other.index for other in (*cls.hyper, *cls.settings, hyper) if other.key == hyper.key)

    @classmethod
    def engine_hyper(cls) -> tuple[Hyper, ...]:
        """What the engine reads of a group."""
        return (LR,) if cls.decay == RULE else (LR, WEIGHT_DECAY)

    @classmethod
    def decoupled(cls) -> bool | str:
        """Whether weight decay is decoupled, or the group's flag that says so."""
        return cls.decay == DECOUPLED if cls.decay in (COUPLED, DECOUPLED, RULE) else cls.decay

    @classmethod
    def is_decoupled(cls, group: Group) -> bool:
        """Whether this group's weight decay is decoupled."""
        decoupled = cls.decoupled()
        return bool(group[decoupled]) if isinstance(decoupled, str) else decoupled


def bias_correction(beta: float, step: float) -> float:
    """``1 - beta**step``, without the cancellation of the plain form."""
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0
