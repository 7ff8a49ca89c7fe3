"""What is stepped: tensors of a suite on a device, and how a step with clipping and loss scaling is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.bench.optimizers import Case
from fusedopt.bench.stored import Stored
from fusedopt.bench.suites import Suite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
POOL = 2**20 + 1  # random values
CACHES = ("cold", "warm")
# Kinds, and how to say it.
GRADIENTS = {"kept": "", "fresh": "new gradients every step", "misaligned": "gradients off 16-byte bounds"}

Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """One question: how long does a step of this optimizer on these tensors take?

    Attributes:
        suite: The tensors' shapes, by param group.
        case: The optimizer.
        dtype: Of parameters and gradients, a key of ``DTYPES``.
        device: Where they are.
        clip: The global norm that gradients are clipped to; None to leave them.
        amp: Whether the step goes through a ``GradScaler``.
        cache: ``cold``: much other memory was touched before each step, as a backward pass does; ``warm``: the same
            step was done three times before.
        gradients: A key of ``GRADIENTS``. ``kept``: the same tensors in every step; ``fresh``: others, made before each
            step as a backward pass makes them; ``misaligned``: kept, and none begins at a multiple of 16 bytes.
    """

    suite: Suite
    case: Case
    dtype: str = "fp32"
    device: str = "cpu"
    clip: float | None = None
    amp: bool = False
    cache: str = "cold"
    gradients: str = "kept"

    @property
    def kind(self) -> str:
        """The kind of device, such as ``cuda``."""
        return torch.device(self.device).type

    def title(self) -> str:
        """One line for people."""
        suite = self.suite
        return described(self, suite.name, self.case.name, len(suite.shapes), suite.numel, len(suite.groups))


def described(how: Any, suite: str, optimizer: str, tensors: int, numel: int, groups: int) -> str:
    """What is stepped, and how, in one line.

    Args:
        how: Has ``dtype``, ``clip``, ``amp``, ``gradients``, ``cache`` and ``device`` as a workload has.
        suite: Its name.
        optimizer: The case's name.
        tensors: Their number.
        numel: Elements of all.
        groups: Number of param groups.
    """
    parts = (
        f"{optimizer} on {suite}: {tensors:,} tensors, {numel / 1e6:.4g}M elements",
        f"{groups} groups" if groups > 1 else "",
        how.dtype,
        f"clip {how.clip:g}" if how.clip else "",
        "AMP" if how.amp else "",
        GRADIENTS[how.gradients],
        how.cache,
        how.device,
    )
    return ", ".join(filter(None, parts))


class Tensors:
    """Parameters with gradients, and the param groups that hand them to an optimizer.

    Args:
        workload: Their shapes, dtype and device.
        single: Give every tensor one element only.
        seed: Of the random values.
    """

    def __init__(self, workload: Workload, *, single: bool = False, seed: int = 0) -> None:
        device, dtype = torch.device(workload.device), DTYPES[workload.dtype]
        values = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        self._values, self._gradients = values, workload.gradients
        self.params: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []
        case = workload.case
        for k, shapes in enumerate(workload.suite.groups):
            made = []
            for shape in shapes:
                one = (1,) * (len(shape) if case.algorithms else 1)
                p = torch.nn.Parameter(_filled(one if single else shape, values))
                p.grad = self._gradient(p)
                made.append(p)
            # Each group with options of its own, or they could be stepped as one.
            factor = 1 + k / 1024
            lr = case.lr if case.one_lr else case.lr * factor
            said = {"lr": lr, "weight_decay": case.weight_decay * factor}
            if case.algorithms:
                hidden = [workload.suite.is_hidden(shape) for shape in shapes]
                self._groups += [{**part, **said} for part in _by_algorithm(made, hidden, case.algorithms)]
            else:
                self._groups.append({"params": made, **said})
            self.params += made

    def groups(self) -> list[dict[str, Any]]:
        """Param groups, a fresh list each time."""
        return [dict(group) for group in self._groups]

    def renew(self) -> None:
        """Give every parameter a new gradient of the same values, as training does, if the workload's are fresh."""
        if self._gradients != "fresh":
            return
        for p in self.params:
            p.grad = None
        for p in self.params:
            p.grad = self._gradient(p)

    def _gradient(self, p: Tensor) -> Tensor:
        return _filled(p.shape, self._values, int(self._gradients == "misaligned")).mul_(0.01)


def _by_algorithm(params: list[Tensor], hidden: list[bool], algorithms: tuple[str, str]) -> list[dict[str, Any]]:
    """Matrices of hidden layers and the rest, as groups of an optimizer that tells them apart."""
    parts = {
        name: [p for p, is_hidden in zip(params, hidden, strict=True) if is_hidden == wanted]
        for name, wanted in zip(algorithms, (True, False), strict=True)
    }
    return [{"params": members, "algorithm": name} for name, members in parts.items() if members]


def _filled(shape: Sequence[int], values: Tensor, offset: int = 0) -> Tensor:
    """A tensor of a shape with random values, which repeat in a large one: drawing them all would take longest.

    It begins ``offset`` elements behind where an allocation does.
    """
    made = torch.empty(math.prod(shape) + offset, device=values.device, dtype=values.dtype)[offset:].view(shape)
    flat, count = made.view(-1), len(values)
    for start in range(0, made.numel(), count):
        part = flat[start : start + count]
        part.copy_(values[: len(part)])
    return made


def ours(
    workload: Workload, groups: list[dict[str, Any]], engine: str, stored: Stored | None = None
) -> fusedopt.FusedOptimizer:
    """Our optimizer, which clips by itself; ``stored`` says in how many bits."""
    case = workload.case
    make = getattr(fusedopt, case.optimizer)
    more = stored.options if stored else {}
    optimizer = make(groups, **case.options, **more, max_grad_norm=workload.clip, engine=engine)
    for name, value in (stored.attributes if stored else {}).items():
        setattr(optimizer, name, value)
    if case.told:
        _tell(optimizer, case.told)
    return optimizer


def _tell(optimizer: Any, told: dict[str, Any]) -> None:
    """Every step is told something besides, and predicted beforehand where it asks for that."""
    step, predict = optimizer.step, getattr(optimizer, "predict", lambda: None)

    def step_and_tell() -> None:
        predict()
        step(**told)

    optimizer.step = step_and_tell


def step_of(optimizer: torch.optim.Optimizer, params: list[Tensor], workload: Workload) -> Step:
    """What its users call for one step: with AMP and clipping, the scaler and ``clip_grad_norm_`` too.

    The scale is 1, so that gradients can be unscaled in place over and over. Clipping does its work each time as well.

    Args:
        optimizer: Whose step.
        params: What it steps.
        workload: Tells clipping and AMP.
    """
    clips = workload.clip is not None and not isinstance(optimizer, fusedopt.FusedOptimizer)
    if not workload.amp:
        if not clips:
            return optimizer.step

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, workload.clip)
            optimizer.step()

        return clipped

    scaler = torch.amp.GradScaler(workload.kind, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=workload.device))  # the scaler makes its tensors when it is first used

    def scaled() -> None:
        if clips:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, workload.clip)
        scaler.step(optimizer)
        scaler.update()

    return scaled


@dataclass(frozen=True)
class Footprint:
    """Bytes of one element.

    Attributes:
        param: Of the parameter, and of the gradient.
        states: Of each state.
    """

    param: int
    states: tuple[int, ...]

    @classmethod
    def of(cls, workload: Workload) -> Footprint:
        """The footprint of our optimizer, whose states are in full."""
        one = replace(workload, suite=Suite("one", (((1,),),)), device="cpu", clip=None)
        tensors = Tensors(one)
        optimizer = ours(one, tensors.groups(), "eager")
        optimizer.step()
        (state,) = optimizer.state.values()
        sizes = tuple(s.element_size() for s in state.values() if isinstance(s, Tensor) and s.shape == (1,))
        return cls(tensors.params[0].element_size(), sizes)

    def tensor_bytes(self, workload: Workload) -> TensorBytes:
        """Bytes of parameters and gradients."""
        numel, twice = workload.suite.numel, bool(workload.clip or workload.amp)
        return TensorBytes(2 * numel * self.param, numel * self.param * (4 if twice else 3))

    def moved(self, workload: Workload) -> int:
        """Bytes that a step of ours has to move."""
        states = 2 * workload.suite.numel * sum(self.states)
        return self.tensor_bytes(workload).moved + states + self.measured(workload)

    def measured(self, workload: Workload) -> int:
        """Those that it reads before it can update, besides a norm's."""
        streams = (self.param, self.param, *self.states)  # in the order in which rules measure them
        return workload.suite.numel * sum(streams[: workload.case.measured])


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of parameters and gradients, whoever steps them.

    Attributes:
        resident: What they take.
        moved: What a step has to move of them: parameters are read and written once, and gradients read once; twice
            where a norm, or the search for values that are not finite, has to come before the update.
    """

    resident: int
    moved: int
