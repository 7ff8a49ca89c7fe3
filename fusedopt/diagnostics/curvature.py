"""The extreme curvatures of a loss by Lanczos iteration, and the learning rates that they suggest."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from fusedopt import checks
from fusedopt.diagnostics import show
from fusedopt.diagnostics.arguments import called, whole
from fusedopt.diagnostics.point import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Batch = TypeVar("Batch")
POWERS = {"sgd": 1.0, "adam": 0.5}  # of the batch size, to which learning rates are proportional
ZERO = 100  # roundings of the largest curvature: what is smaller counts as 0
PRINTED = 3  # curvatures at each end
ROUNDINGS = 10  # of the largest curvature, which bounds are not below; errors beyond residuals were 5 at most


@dataclass(frozen=True)
class Curvature:
    """What ``lanczos_lr`` found, with L the largest curvature, and l the smallest that is positive.

    Of a quadratic, heavy ball converges fastest with ``lr = 4 / (sqrt L + sqrt l)^2`` and
    ``momentum = ((sqrt L - sqrt l) / (sqrt L + sqrt l))^2``, gradient descent with ``lr = 2 / (L + l)``; it diverges
    from ``2 / L`` on. A loss that is no quadratic has these curvatures only here: take them as a scale. Curvatures
    below 100 roundings of the largest one count as 0.

    Attributes:
        values: Ritz values, the largest first: estimates of the Hessian's eigenvalues, the best at both ends.
        bounds: For each, how far the nearest eigenvalue may be: the residual bound, or 10 roundings of the largest
            value where that is more (rounding added at most 5, in 324 runs whose eigenvalues were known).
        lr: Of heavy ball, ``4 / (sqrt L + sqrt l)^2``; None where no curvature is positive.
        momentum: Of heavy ball, ``((sqrt L - sqrt l) / (sqrt L + sqrt l))^2``; None as above.
        plain_lr: Without momentum, ``2 / (L + l)``; None as above.
        stability_limit: ``2 / L``, from which on gradient descent diverges; None as above.
        reason: What is to be known of the suggestion, or why there is none; empty if nothing.
        batch_size: Samples in the batch, if they were told.
    """

    values: tuple[float, ...]
    bounds: tuple[float, ...]
    lr: float | None
    momentum: float | None
    plain_lr: float | None
    stability_limit: float | None
    reason: str
    batch_size: int | None

    def scaled(self, batch_size: int, optimizer: str = "sgd", *, lr: float | None = None) -> float:
        """A learning rate of this batch size for another.

        Args:
            batch_size: The other batch size, in samples.
            optimizer: "sgd": in proportion to the batch size; "adam": to its square root.
            lr: What is scaled; if None, the heavy ball's of these curvatures, which are not those that Adam sees: give
                it a rate that was good with the measured batch size.

        Returns:
            The learning rate.

        Raises:
            ValueError: If the measurement had no batch size, there is no learning rate, or an argument is out of range.

        Reference:
            Granziol, Zohren and Roberts, JMLR 2022, arXiv 2006.09092.
        """
        if optimizer not in POWERS:
            raise ValueError(f"optimizer is {optimizer!r}; it may be {', '.join(map(repr, POWERS))}")
        if self.batch_size is None:
            raise ValueError("the measurement's batch size is not known; give lanczos_lr batch_size=")
        base = self.lr if lr is None else checks.number(lr, "lr", "")
        if base is None:
            raise ValueError(f"there is no learning rate to scale: {self.reason}")
        if not 0 < base < math.inf:
            raise ValueError(f"lr is {base!r}; it must be positive and finite")
        return base * (whole("batch_size", batch_size) / self.batch_size) ** POWERS[optimizer]


def lanczos_lr(
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    model: nn.Module,
    batch: Batch,
    *,
    iterations: int = 30,
    seed: int = 0,
    batch_size: int | None = None,
    quiet: bool = False,
    plot: show.Plot = None,
) -> Curvature:
    """The largest and smallest curvatures of a loss, and the learning rate and momentum that they suggest.

    Lanczos iteration with full reorthogonalisation: from a random unit vector q, each iteration takes one product of
    the Hessian with a vector, ``alpha = q.Hq``, and the next vector is what of Hq lies outside of those before, of
    length beta. The tridiagonal matrix of alphas and betas has the Ritz values as eigenvalues; the residual bound of
    each is the last beta times the last element of its eigenvector. Values at the ends are good first. In a large model
    l is the smallest positive curvature that so many iterations have found, and more of them find smaller ones.

    The forward runs once, as the model is (training or evaluation), so that dropout has one mask. Parameters, ``grad``,
    buffers (BatchNorm's statistics, too) and random numbers (torch's, Python's, numpy's) are as before. It takes memory
    for ``iterations`` vectors as long as all parameters, beside the graph of two backwards. What autograd takes as a
    constant in the backward, as of a custom function before a sum, counts as linear, which cannot be seen.

    Args:
        loss_fn: Takes model and batch, and returns the loss as a scalar.
        model: Float32 or float64.
        batch: What loss_fn is given.
        iterations: Products with the Hessian, at most as many as there are elements.
        seed: Of the start vector's own generator.
        batch_size: Samples in the batch; for ``scaled``.
        quiet: Print no table.
        plot: A PNG file for the Ritz values.

    Raises:
        TypeError: If an argument, a parameter or the loss is of another kind.
        ValueError: If an argument is out of range, or something is not finite.
        RuntimeError: If the loss depends on no parameter, or cannot be differentiated twice.

    Example:
        >>> found = diagnostics.lanczos_lr(lambda model, batch: loss(model(batch[0]), batch[1]), model, (x, y))

    Reference:
        Lanczos 1950; Polyak 1964; Granziol, Zohren and Roberts, JMLR 2022, arXiv 2006.09092.
    """
    show.check_plot(plot)
    checks.kind("model", model, nn.Module, "a torch.nn.Module")
    count = whole("iterations", iterations)
    samples = None if batch_size is None else whole("batch_size", batch_size)
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    with _buffers_kept(model), Point(lambda: called(loss_fn, "loss_fn(model, batch)", model, batch), params) as point:
        alphas, betas = _tridiagonal(point, params, count, seed)
    values, bounds = _ritz(alphas, betas, max(torch.finfo(p.dtype).eps for p in params))
    result = _suggest(values, bounds, params, samples)
    if not quiet:
        _print(result)
    show.draw(plot, "Curvatures of the loss", "Ritz value", "number", lambda axes: _fill(axes, result))
    return result


@contextmanager
def _buffers_kept(model: nn.Module) -> Generator[None]:
    """Buffers are the same tensors, with the same values, afterwards; what was None is None."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    missing = [
        (module, name)
        for module in model.modules()
        for name, buffer in cast("dict[str, Tensor | None]", vars(module).get("_buffers", {})).items()
        if buffer is None
    ]
    try:
        yield
    finally:
        for module, name in missing:
            setattr(module, name, None)
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _tridiagonal(point: Point, params: list[Tensor], iterations: int, seed: int) -> tuple[list[float], list[float]]:
    """Alphas, and betas, of which the last belongs to the vector that would be next."""
    sizes, home = [p.numel() for p in params], params[0].device
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32

    def product(q: Tensor) -> Tensor:
        pieces = torch.split(q, sizes)
        parts = [v.reshape(p.shape).to(p) for v, p in zip(pieces, params, strict=True)]
        return torch.cat([part.to(home, dtype).reshape(-1) for part in point.times(parts)])

    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(sizes), dtype=torch.float64, generator=generator).to(home, dtype)
    basis = torch.empty(min(iterations, len(q)), len(q), dtype=dtype, device=home)
    alphas: list[float] = []
    betas: list[float] = []
    beta = _length(q)
    for i in range(len(basis)):
        basis[i] = q / beta
        w = product(basis[i])
        if not bool(w.isfinite().all()):
            raise ValueError("the product of the Hessian with a vector is not finite")
        alphas.append(float(basis[i].dot(w)))
        known = basis[: i + 1]
        for _ in range(2):  # once leaves what rounding has brought back
            w = w - known.T @ (known @ w)
        q, beta = w, _length(w)
        betas.append(beta)
        size = max(abs(number) for number in (*alphas, *betas))
        if beta <= 10 * torch.finfo(dtype).eps * size:  # all that the start vector has parts of is spanned
            break
    return alphas, betas


def _length(vector: Tensor) -> float:
    """The Euclidean norm."""
    return math.sqrt(float(vector.dot(vector)))


def _ritz(alphas: list[float], betas: list[float], eps: float) -> tuple[list[float], list[float]]:
    """Eigenvalues of the tridiagonal matrix, the largest first, with their bounds by residuals, or by rounding."""
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(matrix))
    bounds = (betas[-1] * vectors[-1].abs()).clamp_min(ROUNDINGS * eps * float(values.abs().max()))
    return [float(value) for value in values.flip(0)], [float(bound) for bound in bounds.flip(0)]


def _suggest(values: list[float], bounds: list[float], params: list[Tensor], batch_size: int | None) -> Curvature:
    """Learning rates, or why there are none."""
    largest, lowest = values[0], values[-1]
    eps = max(torch.finfo(p.dtype).eps for p in params)
    least = ZERO * eps * max(abs(largest), abs(lowest))
    positive = [value for value in values if value > least]
    if not positive:
        reason = (
            f"no curvature is positive (they lie between {lowest:.4g} and {largest:.4g}): no step is stable or best"
        )
        if largest == lowest == 0:
            reason = "no curvature is positive: the Hessian is 0 here, as of a loss that is linear"
        return Curvature(tuple(values), tuple(bounds), None, None, None, None, reason, batch_size)
    high, low = math.sqrt(positive[0]), math.sqrt(positive[-1])
    return Curvature(
        tuple(values),
        tuple(bounds),
        lr=4 / (high + low) ** 2,
        momentum=((high - low) / (high + low)) ** 2,
        plain_lr=2 / (positive[0] + positive[-1]),
        stability_limit=2 / positive[0],
        reason="; ".join(_reasons(values, least, sum(p.numel() for p in params), eps)),
        batch_size=batch_size,
    )


def _reasons(values: list[float], least: float, size: int, eps: float) -> Iterator[str]:
    """What is to be known of a suggestion."""
    if values[-1] < -least:
        yield (
            f"the smallest curvature is {values[-1]:.4g}: this is no minimum's neighbourhood, and l is of its positive "
            "part"
        )
    if dropped := [value for value in values if 0 < value <= least]:
        text = f"{len(dropped)} positive up to {dropped[0]:.4g} count as 0, being below {ZERO} roundings of the largest"
        is_wide = eps == torch.finfo(torch.float64).eps
        yield text if is_wide else f"{text}; l may be one of them, which a model and batch in float64 (.double()) shows"
    if len(values) == 1 < size:
        yield (
            f"one curvature was found, and the model has {size} elements, so that l is L and momentum 0: if they are "
            "not all equal, take more iterations, and float64"
        )


def _print(result: Curvature) -> None:
    """The ends of the spectrum, and the suggestion."""
    pairs = [(f"{value:.6g}", f"{bound:.1e}") for value, bound in zip(result.values, result.bounds, strict=True)]
    shown = pairs if len(pairs) <= 2 * PRINTED else [*pairs[:PRINTED], *pairs[-PRINTED:]]
    show.print_table(f"Curvatures after {len(pairs)} Lanczos iterations", ("Ritz value", "within"), shown)
    if result.lr is not None:
        rows = [
            ("heavy ball: lr", f"{result.lr:.4g}"),
            ("heavy ball: momentum", f"{result.momentum:.4g}"),
            ("gradient descent: lr", f"{result.plain_lr:.4g}"),
            ("gradient descent diverges from lr", f"{result.stability_limit:.4g}"),
        ]
        show.print_table("What they suggest", ("", "value"), rows)
    if result.reason:
        show.say(result.reason)


def _fill(axes: Axes, result: Curvature) -> None:
    """A stem for each value, as high as it is in order."""
    axes.errorbar(
        result.values,
        range(1, len(result.values) + 1),
        xerr=result.bounds,
        fmt="o",
        markersize=3,
        color=show.BLUE,
        ecolor=show.ORANGE,
    )
    axes.set_xscale("symlog", linthresh=max(1e-12, 1e-4 * max(map(abs, result.values))))
