"""Whether schedules of learning rate and betas meet the sufficient condition for the convergence of Generic Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from fusedopt import checks
from fusedopt.diagnostics import show
from fusedopt.diagnostics.arguments import members, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Schedule = float | Callable[[int], float]
Curve = NDArray[np.float64]

FEWEST = 10  # steps: one decade, over which the ratio's trend is judged
FALL = 0.95  # a ratio that tends to 0 is at least this much smaller after ten times as many steps
VANISHING = 0.5  # what tends to 0 is at most this part of itself in each of two decades, or of one its square
LEVELLING = 0.5  # one whose fall, in logarithms, is less than this part of the decade's before tends to something else
GROWTH = 1.02  # what a bound may grow by in the second half of the steps, and count as one
POINTS = 200  # of the curve
ROUNDING = 1e-12  # of schedules that are meant to be constant


@dataclass(frozen=True)
class GenericAdamCheck:
    """What ``check_generic_adam`` found.

    Attributes:
        steps: T.
        ratio: R(T).
        holds: Whether all four conditions hold, as far as T steps show.
        reasons: A sentence for each condition: whether it holds, and why.
        at: Steps of the curve, at most some 200, the last of them T.
        curve: R at these steps.
    """

    steps: int
    ratio: float
    holds: bool
    reasons: list[str]
    at: tuple[int, ...]
    curve: tuple[float, ...]


def check_generic_adam(
    lr: Schedule, betas: tuple[Schedule, Schedule], steps: int, *, quiet: bool = False, plot: show.Plot = None
) -> GenericAdamCheck:
    """The sufficient condition for the convergence of Generic Adam, evaluated over so many steps.

    Generic Adam is ``m <- beta_t m + (1-beta_t) g``, ``v <- theta_t v + (1-theta_t) g^2``,
    ``p <- p - lr_t m / sqrt(v)``. For smooth losses that are bounded below and gradients of bounded second moments,
    the gradient at an iterate drawn at random from the first T tends to 0 in expectation, if

    1. ``0 <= beta_t <= beta < 1``: the largest beta of all steps is below 1, and ``1 - beta_t`` does not tend to 0;
    2. ``0 < theta_t < 1``, and theta_t never decreases;
    3. ``chi_t = lr_t / sqrt(1 - theta_t)`` lies between a non-increasing sequence and a constant times it. The least
       such constant over t steps, ``C(t) = max_(i<=t) chi_i / min_(j<=i) chi_j``, may grow by 2 % in the second half;
    4. ``R(T) = sum_(t<=T) lr_t sqrt(1-theta_t) / (T lr_T)`` tends to 0. With 2 and 3, ``R(T) >= sqrt(1-theta_T) / C``,
       so that ``1 - theta_t`` must tend to 0, too.

    Only 2 is seen in each step; 1, 3 and 4 are judged by trends. What tends to 0 is at T at least 5 % below what it was
    at T/10, and (from 1000 steps on) it fell in the decade before as well, in logarithms at most twice as far;
    ``1 - beta_t`` does if both leave half of it or less (of one, a quarter). A cyclic lr may be judged by its phase at
    T. The theorem has no bias correction and no decay; it is sufficient, and many a run converges without.

    Args:
        lr: Learning rate, positive; a number, or a function of the step t = 1 ... steps (a LambdaLR's begins at 0).
        betas: beta and theta, decay rates of the first and second moment; each a number, or a function of t.
        steps: T, at least 10.
        quiet: Print no table.
        plot: A PNG file for the curve of R.

    Returns:
        R(T), whether the condition holds, why, and the curve.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a learning rate is negative or not finite, or a beta outside [0, 1].

    Example:
        >>> check = diagnostics.check_generic_adam(lambda t: t**-0.5, (0.9, lambda t: 1 - 1 / (t + 1)), 10_000)

    Reference:
        Zou et al., CVPR 2019, arXiv 1811.09358.
    """
    show.check_plot(plot)
    count, (beta, theta) = whole("steps", steps, FEWEST), _pair(betas)
    rates = _values("lr", lr, count, math.inf)
    firsts, seconds = _values("beta", beta, count, 1.0), _values("theta", theta, count, 1.0)
    ratios = _ratios(rates, seconds)
    found = [_first(firsts), _second(seconds), _third(rates, seconds), _fourth(ratios, seconds)]
    at = np.unique(np.geomspace(1, count, POINTS).round().astype(int))
    result = GenericAdamCheck(
        steps=count,
        ratio=float(ratios[-1]),
        holds=all(holds for holds, _ in found),
        reasons=[f"{'holds' if holds else 'fails'}: {why}" for holds, why in found],
        at=tuple(int(t) for t in at),
        curve=tuple(float(ratios[t - 1]) for t in at),
    )
    if not quiet:
        _print(result)
    show.draw(plot, "Generic Adam: R(T) must tend to 0", "T, steps", "R(T)", lambda axes: _fill(axes, result))
    return result


def _pair(betas: object) -> tuple[Schedule, Schedule]:
    """Beta and theta."""
    pair = members(betas)
    if pair is None or len(pair) != 2:
        raise TypeError(f"betas is {betas!r}; it must be a pair of numbers or functions of the step")
    return cast("tuple[Schedule, Schedule]", tuple(pair))


def _values(name: str, schedule: Schedule, count: int, high: float) -> Curve:
    """A schedule at each step, all between 0 and what is highest."""
    if callable(schedule):
        numbers = (checks.number(schedule(t), name, f" at step {t}") for t in range(1, count + 1))
        values = np.fromiter(numbers, np.float64, count)
    else:
        values = np.full(count, checks.number(schedule, name, ""))
    wrong = ~((values >= 0) & (values <= high) & np.isfinite(values))
    if wrong.any():
        t = int(wrong.argmax())
        domain = "not negative, and finite" if math.isinf(high) else "in [0, 1]"
        raise ValueError(f"{name} is {values[t]:g} at step {t + 1}; it must be {domain}")
    return values


def _ratios(rates: Curve, thetas: Curve) -> Curve:
    """R at each step; infinite where the learning rate is 0."""
    sums, products = np.cumsum(rates * np.sqrt(1 - thetas)), np.arange(1, len(rates) + 1) * rates
    return np.divide(sums, products, out=np.full(len(rates), np.inf), where=products > 0)


def _first(betas: Curve) -> tuple[bool, str]:
    """Betas are bounded by one that is below 1."""
    largest = float(betas.max())
    if largest == 1:
        return False, f"beta_t is 1 at step {int(betas.argmax()) + 1}; it must stay below a beta < 1"
    gaps = np.minimum.accumulate(1 - betas)
    decades = _decades(gaps)
    if all(after <= VANISHING ** (3 - len(decades)) * before for before, after in decades):
        return False, f"beta_t looks as if it tended to 1: the least 1 - beta_t is {_ends(gaps)}"
    return True, f"0 <= beta_t <= {largest:.6g} < 1 in all steps"


def _second(thetas: Curve) -> tuple[bool, str]:
    """Thetas lie inside of (0, 1), and never decrease."""
    for end in (0.0, 1.0):
        if (thetas == end).any():
            return False, f"theta_t is {end:g} at step {int((thetas == end).argmax()) + 1}; it must lie in (0, 1)"
    falls = np.diff(thetas) < -ROUNDING
    if falls.any():
        return False, f"theta_t decreases after step {int(falls.argmax()) + 1}"
    return True, f"theta_t lies in (0, 1) and does not decrease (from {thetas[0]:.6g} to {thetas[-1]:.6g})"


def _third(rates: Curve, thetas: Curve) -> tuple[bool, str]:
    """The ratio of chi to the least of it so far is bounded."""
    for what, values in (("lr_t", rates), ("1 - theta_t", 1 - thetas)):
        if (values == 0).any():
            return False, f"chi_t = lr_t / sqrt(1 - theta_t): {what} is 0 at step {int((values == 0).argmax()) + 1}"
    chi = rates / np.sqrt(1 - thetas)
    above = np.maximum.accumulate(chi / np.minimum.accumulate(chi))
    half, whole = float(above[len(above) // 2 - 1]), float(above[-1])
    if whole <= GROWTH * half:
        return True, f"chi_t = lr_t / sqrt(1 - theta_t) stays within {whole:.4g} times a non-increasing sequence"
    return False, (
        f"chi_t = lr_t / sqrt(1 - theta_t) grows: the constant above a non-increasing sequence is {half:.4g} after "
        f"half of the steps, and {whole:.4g} after all"
    )


def _fourth(ratios: Curve, thetas: Curve) -> tuple[bool, str]:
    """R tends to 0, and so does what it is not below."""
    tenth, last = float(ratios[len(ratios) // 10 - 1]), float(ratios[-1])
    if not math.isfinite(last):
        return False, "R(T) is infinite, as lr_T is 0"
    said = f"R(T/10) = {tenth:.4g}, R(T) = {last:.4g}"
    if why := _stays(1 - thetas):
        needed = "R(T) cannot tend to 0, as theta_t does not tend to 1"
        return False, f"{needed}: 1 - theta_t {why}, being {_ends(1 - thetas)}; {said}"
    if why := _stays(ratios):
        return False, f"R(T) {why}: {said}"
    return True, f"R(T) falls: {said}"


def _stays(values: Curve) -> str:
    """Why values that are not negative do not look as if they tended to 0; empty if they do.

    They must fall in the last decade. Where they did not in the one before, this is no evidence: a constant that is
    lower from some step on does so, too. Where they fell much more then, they level off.
    """
    count, last = len(values), float(values[-1])
    tenth = float(values[count // 10 - 1])
    if last == 0:
        return ""
    if not last <= FALL * tenth:
        return "does not tend to 0"
    if count < 1000 or not math.isfinite(hundredth := float(values[count // 100 - 1])) or not math.isfinite(tenth):
        return ""
    fall, before = math.log(tenth / last), math.log(hundredth / tenth)
    if before <= ROUNDING:
        return "falls in the last of two decades only, which is no evidence (more steps may show it)"
    return "levels off" if fall < LEVELLING * before else ""


def _decades(values: Curve) -> list[tuple[float, float]]:
    """What values are before and after each of the last two decades, or of the last where there are fewer than 1000."""
    count = len(values)
    at = [float(values[count // part - 1]) for part in (100, 10, 1) if count // part and (part < 100 or count >= 1000)]
    return list(zip(at, at[1:], strict=False))


def _ends(values: Curve) -> str:
    """What a trend is seen by."""
    return f"{values[len(values) // 10 - 1]:.4g} at T/10 and {values[-1]:.4g} at T"


def _print(result: GenericAdamCheck) -> None:
    """The conditions, and what is so of each."""
    names = ("beta_t bounded below 1", "theta_t in (0, 1), rising", "chi_t almost non-increasing", "R(T) tends to 0")
    rows = [(name, *reason.split(": ", 1)) for name, reason in zip(names, result.reasons, strict=True)]
    verdict = "all conditions hold" if result.holds else "no guarantee"
    show.print_table(
        f"Generic Adam over {result.steps} steps: {verdict}; R(T) = {result.ratio:.4g}", ("condition", "", "why"), rows
    )


def _fill(axes: Axes, result: GenericAdamCheck) -> None:
    """The curve, without what is infinite."""
    points = [(t, r) for t, r in zip(result.at, result.curve, strict=True) if 0 < r < math.inf]
    axes.plot([t for t, _ in points], [r for _, r in points], color=show.BLUE)
    axes.set_xscale("log")
    axes.set_yscale("log")
