"""GradInit: before training, one scale for each weight tensor, so that the first step lowers the loss the most."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusedopt import checks, interrupts, memory
from fusedopt.diagnostics.arguments import called, whole
from fusedopt.diagnostics.point import ONCE, ends_early, random_numbers_kept
from fusedopt.optimizers.adam import Adam

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")
Rule = Literal["sgd", "adam"]

ORDERS: dict[str, int] = {"sgd": 2, "adam": 1}  # of the norm: lr times it is what the step promises
RATES: dict[str, float] = {"sgd": 0.1, "adam": 1e-3}


@dataclass(frozen=True)
class GradInit:
    """What ``grad_init`` did.

    Args:
        scales: By the names of ``model.named_parameters()``, what each tensor was multiplied by.
        losses: Of each step, the loss of its first batch with the scales until then.
        grad_norms: Of each step, the norm of that loss's gradient: l2 for "sgd", l1 for "adam".
        norm_steps: How many steps lowered the norm, because it was above ``gamma``.
    """

    scales: dict[str, float]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    norm_steps: int


def grad_init(
    model: Model,
    loss_fn: Callable[[Model, Batch], Tensor],
    batches: Iterable[Batch],
    optimizer: Rule = "sgd",
    *,
    lr: float | None = None,
    gamma: float | None = None,
    scale_lr: float = 1e-2,
    steps: int = 390,
    floor: float = 0.01,
    grad_clip: float = 1.0,
    overlap: bool = True,
    progress: bool = True,
) -> GradInit:
    """Multiply each parameter tensor by a scale, so that one training step lowers the loss as far as it can.

    Of weights ``w = a w0`` and the gradient ``g`` of a batch's loss, each step of Adam on the scales ``a`` lowers
    ``L(w - lr A(g)) / lr``, where ``L`` is the loss on the next batch and ``A(g)``, a constant, is ``g / |g|`` for
    "sgd" and ``sign(g)`` for "adam"; or, where ``|g| > gamma``, it lowers ``|g|``. Then ``a <- max(a, floor)``.
    It works on copies: the parameters change at the end, in place, and nothing else does.

    Args:
        model: Its parameters that require gradients are scaled, tied ones by one scale; what is zero stays zero.
        loss_fn: Returns the mean loss of the model and the batch that it is given, twice differentiable.
        batches: Taken again from the start where they end; at least two.
        optimizer: What will train: "sgd" or "adam".
        lr: Of that step, as a rule that of the training to come; if not given the authors', 0.1 and for "adam" 1e-3.
        gamma: The largest norm of the gradient: l2 for "sgd", 1 if not given; l1 for "adam", 1 / lr if not given.
        scale_lr: Adam's learning rate for the scales, which begin at 1.
        steps: How many steps are taken on the scales.
        floor: The least scale, in (0, 1].
        grad_clip: The largest derivative by a scale; what is beyond it is cut off.
        overlap: Whether L is the mean over both batches, or over the next one only.
        progress: Whether a terminal shows how far it is.

    Returns:
        The scales, and the losses and norms on the way.

    Raises:
        TypeError: If an argument or a parameter is of the wrong kind, or what ``loss_fn`` returns.
        ValueError: If an option is out of range, there are too few batches, or a loss is not finite, or not of the
            parameters. After these and any other error the model is as it was.

    Example:
        >>> fusedopt.grad_init(model, lambda model, batch: loss(model(batch[0]), batch[1]), batches, "sgd", lr=0.1)

    Reference:
        Zhu et al., NeurIPS 2021, arXiv 2102.08098, algorithm 1, and the authors' code.
    """
    checks.kind("model", model, nn.Module, "a torch.nn.Module")
    checks.kind("batches", batches, Iterable, "an iterable of batches")
    options = _Options(optimizer, lr, gamma, scale_lr, steps, floor, grad_clip, overlap)
    params = _parameters(model)
    with _as_before(model, params.values()), closing(_endless(batches, options.steps)) as endless:
        search = _Search(_Loss(model, loss_fn), params, options)
        with _bar(options.steps, progress) as advance:
            for _ in range(options.steps):
                advance(search.step(endless))
    return search.finish()


class _Options:
    """The options of a search, which are in their ranges."""

    def __init__(
        self, rule: object, lr: float | None, gamma: float | None, scale_lr: float, steps: object, floor: float,
        clip: float, overlap: bool,
    ) -> None:  # fmt: skip
        if not isinstance(rule, str) or rule not in ORDERS:
            raise ValueError(f"optimizer is {rule!r}; it must be {' or '.join(map(repr, get_args(Rule)))}")
        self.rule, self.order, self.overlap = rule, ORDERS[rule], overlap
        self.lr, self.scale_lr = _positive("lr", RATES[rule] if lr is None else lr), _positive("scale_lr", scale_lr)
        self.floor, self.clip = _positive("floor", floor, most=1.0), _positive("grad_clip", clip, most=float("inf"))
        promised = 1.0 if rule == "sgd" else 1 / self.lr
        self.gamma = promised if gamma is None else _positive("gamma", gamma, most=float("inf"))
        self.steps = whole("steps", steps)


class _Loss(nn.Module):
    """The loss of a model on a batch, as functional_call wants it."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn is {loss_fn!r}; it must be called as loss_fn(model, batch)")
        super().__init__()
        self.model = model
        self._of = (loss_fn,)  # in a tuple, lest one that is a module be registered

    def forward(self, batch: object) -> Tensor:
        """The mean loss."""
        return cast("Tensor", called(self._of[0], "loss_fn(model, batch)", self.model, batch))


class _Search:
    """The scales on their way, and copies of weights that are scaled by them."""

    def __init__(self, loss: _Loss, params: dict[str, Tensor], options: _Options) -> None:
        self._params, self._loss, self._options = params, loss, options
        wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in params.items()}
        self._scales = [torch.ones((), dtype=wide[name], device=p.device) for name, p in params.items()]
        self._adam = Adam([scale.requires_grad_() for scale in self._scales], lr=options.scale_lr)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._norm_steps = self._number = 0

    def step(self, batches: Iterator[object]) -> str:
        """One step of Adam on the scales, and what there is to say of it."""
        o, first, self._number = self._options, next(batches), self._number + 1
        pairs = zip(self._params.values(), self._scales, strict=True)
        weights = [(p.detach().to(scale.dtype) * scale).to(p.dtype) for p, scale in pairs]
        loss = self._evaluate(weights, first, "")
        with _told():
            gradients = self._given(torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True), weights)
        norm = _norm(gradients, o.order)
        if self._note(loss, norm) <= o.gamma:
            value = self._stepped(weights, gradients, norm, first, next(batches)) / o.lr
        else:
            value, self._norm_steps = norm, self._norm_steps + 1
            if self._norm_steps == 1 and ends_early([norm]):
                raise RuntimeError(ONCE)
        self._move(value)
        return f"loss {self._losses[-1]:.3g}, gradient norm {self._norms[-1]:.3g}"

    def _given(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
        """Gradients, with zeros for weights that the loss does not use."""
        if all(g is None for g in gradients):
            where = f"at step {self._number} on the scales"
            raise ValueError(f"loss_fn depends on none of the parameters of the model that it is given, {where}")
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]

    def _evaluate(self, weights: Sequence[Tensor], batch: object, when: str) -> Tensor:
        """The loss with other weights, and with copies of the buffers, for a batch."""
        given = {f"model.{name}": w for name, w in zip(self._params, weights, strict=True)}
        given |= {f"model.{name}": b.clone() for name, b in self._loss.model.named_buffers()}
        loss: object = functional_call(self._loss, given, (batch,))
        where = f" at step {self._number} on the scales{when}"
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"loss_fn returned {what}{where}; it must return the mean loss, one floating point number")
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()}{where}; it must be finite")
        if not loss.requires_grad:
            raise ValueError(f"the loss{where} does not depend on any parameter by what autograd can follow")
        return loss.reshape(())

    def _note(self, loss: Tensor, norm: Tensor) -> float:
        """Keep both, and return the norm."""
        if not isfinite(found := norm.item()):
            raise ValueError(f"the gradient's norm is {found} at step {self._number} on the scales; it must be finite")
        self._losses.append(loss.item())
        self._norms.append(found)
        return found

    def _stepped(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], norm: Tensor, first: object, second: object
    ) -> Tensor:
        """The loss after a step, which is a constant."""
        o, after = self._options, list[Tensor]()
        length = norm.detach().clamp_min(torch.finfo(norm.dtype).tiny)
        for w, g in zip(weights, gradients, strict=True):
            direction = g.detach().sign() if o.rule == "adam" else g.detach() / length.to(g.device)
            after.append(w - (o.lr * direction).to(w.dtype))
        loss = self._evaluate(after, second, ", after a training step")
        return (loss + self._evaluate(after, first, ", after a training step")) / 2 if o.overlap else loss

    def _move(self, value: Tensor) -> None:
        """Let Adam lower a value by the scales, down to their floor."""
        o, found = self._options, [None] * len(self._scales)
        if value.requires_grad:  # a norm that no scale changes does not
            with _told():
                found = torch.autograd.grad(value, self._scales, allow_unused=True)
        for name, scale, gradient in zip(self._params, self._scales, found, strict=True):
            if gradient is not None and not gradient.isfinite():
                where = f"at step {self._number} on the scales"
                raise ValueError(f"the derivative by the scale of {name!r} is {gradient.item()} {where}")
            scale.grad = torch.zeros_like(scale) if gradient is None else gradient.clamp(-o.clip, o.clip)
        self._adam.step()
        with torch.no_grad():
            for scale in self._scales:
                scale.clamp_(min=o.floor)

    def finish(self) -> GradInit:
        """Multiply the parameters, all or none."""
        scales = {name: scale.item() for name, scale in zip(self._params, self._scales, strict=True)}
        with interrupts.held_back(), torch.no_grad():
            for name, p in self._params.items():
                p.mul_(scales[name])
        return GradInit(scales, tuple(self._losses), tuple(self._norms), self._norm_steps)


def _positive(name: str, value: object, most: float = torch.finfo(torch.float32).max) -> float:
    """An option as a float, which is positive and not too large."""
    if not 0 < (result := checks.number(value, name, "")) <= most:
        raise ValueError(f"{name} is {value!r}; it must lie in (0, {most:g}]")
    return result


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are scaled, each once; they can be."""
    params: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"model ({type(model).__name__}) has no parameter that requires gradients")
    for name, p in params.items():
        if memory.is_dtensor(p) or getattr(p, "_fsdp_flattened", False):
            raise TypeError(f"parameter {name!r} is sharded among ranks; call grad_init before the model is sharded")
        if reason := memory.unreadable(p) or memory.shortage(p):
            raise TypeError(f"parameter {name!r} cannot be scaled: {reason}")
        if not p.is_floating_point() or p.element_size() == 1:
            raise TypeError(f"parameter {name!r} is {p.dtype}; it must be real and floating point, of 16 bits or more")
        if p.device.type == "meta" or p.is_inference() or memory.overlaps(p):
            what = "has no memory" if p.device.type == "meta" else "cannot be written in place"
            raise ValueError(f"parameter {name!r} {what}, so that it cannot be scaled")
    if any(memory.waves([([p], []) for p in params.values()])):
        raise ValueError("parameters of the model share memory, and are not the same tensor; tie them as one parameter")
    return params


def _norm(gradients: Sequence[Tensor], order: int) -> Tensor:
    """The norm of all gradients together, in float32 or wider."""
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    vector_norm = cast("Callable[[Tensor, int], Tensor]", torch.linalg.vector_norm)
    norms = [vector_norm(g.to(dtype), order).to(gradients[0].device) for g in gradients]
    return vector_norm(torch.stack(norms), order)


@contextmanager
def _told() -> Generator[None, None, None]:
    """Errors of autograd say what was asked of it; they are what they were."""
    try:
        yield
    except RuntimeError as error:
        error.add_note("grad_init needs a loss_fn of operations that can be differentiated twice")
        raise


@contextmanager
def _as_before(model: nn.Module, params: Iterable[Tensor]) -> Generator[None, None, None]:
    """Autograd on; and afterwards what draws random numbers, and modes of modules, are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    # inference_mode(False) turns gradients on, inside of no_grad too.
    with random_numbers_kept(params), torch.inference_mode(False):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _endless(batches: Iterable[Any], steps: int) -> Generator[Any, None, None]:
    """The batches again and again."""
    count, passes = 0, 0
    while True:
        before = count
        for batch in batches:
            yield batch
            count += 1
        passes += 1
        if count < 2 and passes == 1:
            raise ValueError(
                f"batches has {count or 'none'}; it must have two or more: a step is judged by another batch"
            )
        if count == before:
            raise ValueError(
                f"batches ended after {count}, and cannot be taken again; {steps} steps on the scales take up to "
                f"{2 * steps}: give a list or a DataLoader, or fewer steps"
            )


@contextmanager
def _bar(steps: int, is_shown: bool) -> Generator[Callable[[str], object], None, None]:
    """What advances a progress bar, which is there in a terminal only and disappears when it is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)  # one of its own, since a console shows one bar at a time
    if not is_shown or not (console.is_terminal or console.is_jupyter):
        yield lambda text: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("grad_init", total=steps)
        yield lambda text: bar.update(task, advance=1, description=f"grad_init: {text}")
