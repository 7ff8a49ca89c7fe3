"""The gate: an engine may err by twice what the reference itself errs in the same precision.

fp32: 300 steps, 60 of options beside a rule; the largest distance from the fp64 truth is at most twice the oracle's.
fp64: as many; relative distance from the oracle at most 1e-12 (NAdam 1e-8: torch keeps a product in fp32).
bf16, fp16: one step from the same state; at most one unit in the last place from the fp64 result, rounded once
(where the step cancels the parameter, what fp32 rounds off the parameter itself is not counted).
Where a step is a sign (Lion), elements whose sign hangs on rounding are left out; there may be few.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt.aliases import Memory
from fusedopt.engines import ENGINES
from fusedopt.verification import oracles
from fusedopt.verification.cases import CASES, Case
from fusedopt.verification.options import OPTION_CASES
from fusedopt.verification.trajectory import CPU, Make, asked, gradients, parameters, predict, run, run_reference

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
MAX_DOUBTFUL = 0.02
CANCELLED = 2.0**-22  # a few fp32 roundings on either side
VISIBLE = 100  # times lr: makes one step large beside the last place of a half precision parameter


@dataclass(frozen=True)
class Result:
    """One comparison. Passed when ``error <= limit``, both in ``unit``."""

    optimizer: str
    engine: str
    dtype: str
    oracle: str
    error: float
    limit: float
    unit: str
    passed: bool
    note: str = ""


def comparisons(engines: Iterable[str], optimizers: Iterable[str] | None) -> list[tuple[Case, str, torch.dtype]]:
    """What ``verify`` goes through."""
    wanted = None if optimizers is None else {name.lower() for name in optimizers}
    everyone = (*CASES, *OPTION_CASES)
    cases = [c for c in everyone if wanted is None or {c.name.lower(), c.optimizer.lower()} & wanted]
    return [(case, name, dtype) for case in cases for name in engines if _has(name, case) for dtype in DTYPES]


def _has(name: str, case: Case) -> bool:
    """Whether an engine has a kernel for a case's rule; one that is not here is to say so itself."""
    engine = ENGINES[name]
    if engine.available() is not None:
        return True
    p = torch.nn.Parameter(torch.zeros(case.replicas, device=engine.home()))
    one = case.build([p])
    return engine.accepts(p, one.param_groups[0], one.rule, {}) is None


def verify(
    engines: Iterable[str],
    optimizers: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Compare optimizers on engines with their references.

    Args:
        engines: Names.
        optimizers: Names of classes or cases; None for all.
        progress: Called with a name before each comparison.

    Returns:
        One result for each case, engine and dtype.
    """
    results: list[Result] = []
    for case, engine, dtype in comparisons(engines, optimizers):
        progress(f"{case.name} on {engine}, {_name(dtype)}")
        results.append(compare(case, engine, dtype))
    return results


def compare(case: Case, engine: str, dtype: torch.dtype, steps: int | None = None) -> Result:
    """One case on one engine, on the device that it is for."""
    steps = steps or case.steps
    if dtype in HALF:
        return _compare_one_step(case, engine, dtype)
    truth, skip = _truth(case, steps)
    device = ENGINES[engine].home()
    run_ours = partial(run, lambda p: case.build(p, engine=engine), dtype, steps, replicas=case.replicas)
    ours = results(case, *run_ours(resume=True, device=device))
    error = _distance([t.cpu() for t in ours], truth, skip)
    if dtype == torch.float64:
        scale = max(t.abs().max().item() for t in truth if t.numel())
        return _result(case, engine, dtype, error / scale, case.exact, "relative", steps=steps)
    return _result(case, engine, dtype, error, 2 * _own_error(case, steps), "absolute", steps=steps)


def has_oracle(case: Case) -> bool:
    """Whether the oracle is installed; if not, the textbook loop stands in."""
    return oracles.find(case.oracle) is not None


def oracle(case: Case, params: list[Parameter]) -> torch.optim.Optimizer:
    """The oracle with a case's options."""
    cls = oracles.find(case.oracle)
    assert cls is not None
    options = {
        **oracles.options(cls, case.build(parameters(torch.float32, replicas=case.replicas)).defaults),
        **case.theirs,
    }
    make = cast("Callable[..., torch.optim.Optimizer]", cls)
    if case.alone:
        return cast("torch.optim.Optimizer", oracles.Alone(lambda ps: make(ps, **options), params))
    with redirect_stdout(StringIO()):  # prodigyopt prints which decay it takes
        return make(params, **options)


def results(case: Case, params: list[Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a run is judged by: the parameters, and such states as are results, too."""
    states = (optimizer.state[p][name] for name in case.results for p in params)
    return [*(p.detach() for p in params), *states]


def reference_results(case: Case, params: list[Tensor], states: list[Memory]) -> list[Tensor]:
    """The same of a textbook loop."""
    return [*params, *(state[name] for name in case.results for state in states)]


@cache
def _truth(case: Case, steps: int) -> tuple[list[Tensor], list[Tensor] | None]:
    """The fp64 result, and which elements hang on rounding."""
    loop = run_reference(case, torch.float64, steps) if case.signs or not has_oracle(case) else None
    skip = [state["doubtful"] for state in loop[1]] if loop and case.signs else None
    if loop and not has_oracle(case):
        return reference_results(case, *loop), skip
    return results(case, *run(lambda p: oracle(case, p), torch.float64, steps)), skip


@cache
def _own_error(case: Case, steps: int) -> float:
    """How far the oracle itself is from the truth in fp32."""
    truth, skip = _truth(case, steps)
    if has_oracle(case):
        theirs = results(case, *run(lambda p: oracle(case, p), torch.float32, steps))
    else:
        theirs = reference_results(case, *run_reference(case, torch.float32, steps))
    return _distance(theirs, truth, skip)


def _distance(result: list[Tensor], truth: list[Tensor], skip: list[Tensor] | None) -> float:
    worst = 0.0
    for k, (a, b) in enumerate(zip(result, truth, strict=True)):
        gap = (a.double() - b.double()).abs()
        if skip is not None:
            gap = gap[~skip[k % len(skip)]]  # results after the parameters are in their order, too
        if gap.numel():
            worst = max(worst, gap.max().item() if not gap.isnan().any() else float("inf"))
    return worst


def _compare_one_step(case: Case, engine: str, dtype: torch.dtype) -> Result:
    steps = 12
    *_, last = gradients(steps + 1, replicas=case.replicas)
    home = ENGINES[engine].home()
    make_ours = partial(case.build, engine=engine)
    start, before = run(make_ours, dtype, steps=steps, device=home, replicas=case.replicas)
    predict(before)
    start = [p.detach().cpu() for p in start]
    state = copy.deepcopy(before.state_dict())
    for group in state["param_groups"]:
        group["lr"] *= VISIBLE

    def step(make: Make, kind: torch.dtype, device: torch.device = CPU) -> tuple[list[Tensor], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(p.to(device, kind, copy=True)) for p in start]
        optimizer = make(params)
        optimizer.load_state_dict(oracles.complete(copy.deepcopy(state), optimizer, case.flat))
        for p, g in zip(params, last, strict=True):
            p.grad = None if g is None else g.to(device, kind)
        oracles.step(optimizer, **asked(optimizer, steps))
        return [p.detach().cpu() for p in params], optimizer

    ours, _ = step(make_ours, dtype, home)
    # A textbook loop cannot read a state; the eager rule in fp64, which the loop has judged, can.
    make = partial(oracle, case) if has_oracle(case) else partial(case.build, engine="eager")
    for entry in state["state"].values():  # adabound computes with the tensor as it is
        entry.update({k: v.cpu().double() for k, v in entry.items() if k == "step"})
    truth, after = step(make, torch.float64)
    worst, doubtful, total = 0, 0, 0
    for k, (a, b) in enumerate(zip(ours, truth, strict=True)):
        cancelled = (a.double() - b).abs() <= CANCELLED * start[k].double().abs()
        gap = ulps(a, b.to(dtype)).masked_fill(cancelled, 0)
        gradient = last[k]
        if case.signs and gradient is not None:
            beta1 = after.param_groups[0]["betas"][0]
            m, g = state["state"][k]["exp_avg"].cpu().double(), gradient.double()
            c = beta1 * m + (1 - beta1) * g
            doubt = (c.abs() < 1e-5 * ((beta1 * m).abs() + ((1 - beta1) * g).abs())) & (c != 0)
            doubtful += int(doubt.sum())
            gap = gap[~doubt]
        total += b.numel()
        if gap.numel():
            worst = max(worst, int(gap.max()))
    note = f"{doubtful} of {total} signs hang on rounding" if case.signs else ""
    if doubtful > MAX_DOUBTFUL * total:
        worst = max(worst, 2)
    return _result(case, engine, dtype, worst, 1, "ulp", note)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in units of the last place, for bfloat16 and float16 tensors; NaN only matches NaN."""

    def ordered(t: Tensor) -> Tensor:
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    gap = (ordered(a) - ordered(b)).abs()
    one_nan = a.isnan() ^ b.isnan()
    return torch.where(one_nan, torch.full_like(gap, 1 << 16), torch.where(a.isnan() & b.isnan(), 0, gap))


def _result(
    case: Case,
    engine: str,
    dtype: torch.dtype,
    error: float,
    limit: float,
    unit: str,
    note: str = "",
    steps: int = 0,
) -> Result:
    source = oracles.version(case.oracle) if has_oracle(case) else "textbook loop"
    if not has_oracle(case):
        package = case.oracle.partition(":")[0]
        note = f"{package} is not installed" if package != "none" else ""
    elif dtype == torch.float32 and case.signs:
        _, skip = _truth(case, steps)
        assert skip is not None
        doubtful, total = sum(int(s.sum()) for s in skip), sum(s.numel() for s in skip)
        note = f"{doubtful} of {total} signs hang on rounding"
        if doubtful > MAX_DOUBTFUL * total:
            error = float("inf")
    return Result(case.name, engine, _name(dtype), source, error, limit, unit, error <= limit, note)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
