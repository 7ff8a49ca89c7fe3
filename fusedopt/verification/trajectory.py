"""The inputs that every comparison shares: hard gradients, schedules, and a resume in the middle."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedopt.aliases import Arguments, Group, Memory, ParamGroup
from fusedopt.optimizers.koala import KoalaM, MeasuresLoss
from fusedopt.verification import oracles
from fusedopt.verification.cases import Case

STEPS = 300
# Empty, scalar, odd, one past a vector, one past the smallest tile, and a matrix.
SHAPES = ((0,), (), (1,), (31,), (4097,), (37, 29))

CPU = torch.device("cpu")

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def shapes(replicas: int = 1) -> list[tuple[int, ...]]:
    """Those of the parameters, of which so many may be stacked."""
    return [(replicas, *shape) if replicas > 1 else shape for shape in SHAPES]


def parameters(
    dtype: torch.dtype, device: torch.device = CPU, seed: int = 0, replicas: int = 1
) -> list[torch.nn.Parameter]:
    """Parameters whose values any dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes(replicas))
    return [torch.nn.Parameter(v.to(device, dtype)) for v in values]


def gradients(steps: int, seed: int = 1, replicas: int = 1) -> Iterator[list[Tensor | None]]:
    """Heavy-tailed gradients in bfloat16, a fifth of them zero; now and then a zero tensor, or none."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        step: list[Tensor | None] = []
        for k, shape in enumerate(shapes(replicas)):
            tails = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(1.5).exp()
            kept = torch.rand(shape, generator=generator) > 0.2
            g = (tails * kept * ((t + k) % 11 != 5)).bfloat16()
            step.append(None if (t + 2 * k) % 7 == 3 else g)
        yield step


def schedule(group: ParamGroup, base: Group, t: int) -> None:
    """What schedulers do: lr moves, and beta1 or momentum with it."""
    wave = math.sin(t / 9)
    group["lr"] = base["lr"] * (1 + 0.5 * wave)
    if "betas" in base:
        group["betas"] = (base["betas"][0] - 0.04 * (1 + wave), *base["betas"][1:])
    if base.get("momentum"):
        group["momentum"] = base["momentum"] - 0.04 * (1 + wave)


def losses(t: int) -> Tensor:
    """Those of three samples in a step, in double."""
    return torch.tensor([1.5 + math.sin(t / 5), 0.75, 0.5 + math.cos(t / 3) ** 2], dtype=torch.float64)


def asked(optimizer: torch.optim.Optimizer, t: int) -> Arguments:
    """What an optimizer's step takes besides gradients: the losses, if it measures them. It is predicted beforehand."""
    predict(optimizer)
    return {"per_sample_loss": losses(t)} if isinstance(optimizer, MeasuresLoss) else {}


def predict(optimizer: torch.optim.Optimizer) -> None:
    """Predict what asks for it, unless it is."""
    if isinstance(optimizer, KoalaM) and not optimizer.param_groups[0]["predicted"]:
        optimizer.predict()


def run(
    make: Make,
    dtype: torch.dtype,
    steps: int = STEPS,
    resume: bool = False,
    device: torch.device = CPU,
    replicas: int = 1,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Step an optimizer through the trajectory.

    Args:
        make: Builds it from parameters.
        dtype: Of parameters and gradients.
        steps: How many.
        resume: Before the middle, save the state, and go on with a new optimizer that loads it.
        device: Of parameters and gradients.
        replicas: How many of each are stacked.

    Returns:
        The parameters at the end, and the optimizer.
    """
    params = parameters(dtype, device, replicas=replicas)
    optimizer = make(params)
    base = [dict(group) for group in optimizer.param_groups]
    for t, step in enumerate(gradients(steps, replicas=replicas)):
        if resume and t == steps * 7 // 15:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = make(params)
            optimizer.load_state_dict(torch.load(file))
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.to(device, dtype)
        for group, own in zip(optimizer.param_groups, base, strict=True):
            schedule(group, own, t)
        oracles.step(optimizer, **asked(optimizer, t))
    return params, optimizer


def _said(case: Case, dtype: torch.dtype) -> tuple[list[ParamGroup], list[int]]:
    """What each parameter's group says, and which of the optimizer's it is: one group may have become several."""
    params = parameters(dtype, replicas=case.replicas)
    groups = [(id(p), group) for group in case.build(params).param_groups for p in group["params"]]
    said, order = dict(groups), [place for place, _ in groups]
    return [dict(said[id(p)]) for p in params], [order.index(id(p)) for p in params]


def run_reference(case: Case, dtype: torch.dtype, steps: int = STEPS) -> tuple[list[Tensor], list[Memory]]:
    """Step a case's textbook loop through the trajectory; returns parameters and states."""
    if case.reference is None:
        raise LookupError(f"{case.name} has no textbook loop, and its oracle {case.oracle} is not installed")
    params: list[Tensor] = [p.detach() for p in parameters(dtype, replicas=case.replicas)]
    options, numbers = _said(case, dtype)
    states: list[Memory] = [{"number": number} for number in numbers]
    base = [dict(group) for group in options]
    for t, step in enumerate(gradients(steps, replicas=case.replicas)):
        for group, own in zip(options, base, strict=True):
            schedule(group, own, t)
        if case.together:
            gradients_of = [None if g is None else g.to(dtype) for g in step]
            params = case.reference(params, gradients_of, states, options[0], losses(t))
            continue
        for k, g in enumerate(step):
            if g is not None:
                params[k] = case.reference(params[k], g.to(dtype), states[k], options[k])
    return params, states
