"""NSGD: SGD whose step is divided by the power of a layer's input, and the hooks that measure it."""

# Torch has no public name for a list of hooks.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedopt import checks, memory
from fusedopt.aliases import Group, ParamGroup, ParamsT, ParamState, ProcessGroup, StateDict, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.sgd import MOMENTUM, SGDRule
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, EPS, Hypers, Rule, Scalars, State, States

LAYER, IN_CHANNEL = GRANULARITIES = ("layer", "in_channel")
L1, L2 = NORMS = ("l1", "l2")


Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Power = tuple[Tensor, Layer, Tensor]  # a parameter, its layer, and what that has seen
Seen = tuple[Layer, list[tuple[Tensor, int]]]  # a layer, and the sums and counts of its hooks


class NSGDRule(Rule):
    """SGD's direction times ``scale``, and times ``channel_scale`` where input channels have their own."""

    name = "nsgd"
    hyper: Hypers = MOMENTUM
    settings: Hypers = (EPS,)
    states: States = (
        State("momentum_buffer", when="momentum"),
        State("channel_scale", when="per_channel", init=1.0, signed=False, exact=True),
    )
    scalars: Scalars = {"step": 0.0, "scale": 1.0}
    decay = COUPLED

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        return SGDRule.conflict(group)

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(**vars(SGDRule.prepare(h, s, new_state)), scale=s.scale)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        of_sgd = {name: state[name] for name in state if name == "momentum_buffer"}
        d, new = SGDRule.direction(p, g, of_sgd, c)
        scales = {name: state[name] for name in state if name == "channel_scale"}
        for channels in scales.values():
            d = d * channels
        return c.scale * d, {**new, **scales}


class _Hook:
    """What a layer's input has had of power since it was last asked: a forward pre-hook, which pickles and copies."""

    def __init__(self, norm: str, granularity: str) -> None:
        self.norm, self.granularity = norm, granularity
        self.total: Tensor | None = None  # over all vectors; of each channel with "in_channel"
        self.count = 0  # of vectors

    def __call__(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if not torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], Tensor):
            return
        x = inputs[0].detach()
        channels = -1 if isinstance(module, nn.Linear) else x.dim() - _n_positions(cast("Layer", module)) - 1
        x = x.movedim(channels, -1).reshape(-1, x.shape[channels])
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        each = x.abs() if self.norm == L1 or x.is_complex() else x
        each = each if self.norm == L1 else each.square()
        found = each.sum() if self.granularity == LAYER else each.sum(0)
        self.total = found if self.total is None else self.total.to(found.device) + found
        self.count += x.shape[0]


def _n_positions(module: Layer) -> int:
    return len(cast("tuple[int, ...]", module.kernel_size))


def _check(norm: str, granularity: str) -> None:
    """Both are what there is."""
    for name, value, known in (("norm", norm, NORMS), ("granularity", granularity, GRANULARITIES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it may be {' or '.join(map(repr, known))}")


def _hooks(module: nn.Module) -> dict[int, object]:
    return cast("dict[int, object]", module._forward_pre_hooks)


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


class InputPowers:
    """Hooks on a model's linear and convolutional layers, which measure the power of their inputs.

    The power is the mean, over the batch and all positions, of ``|x|^2`` or ``|x|_1``, x being the vector of a layer's
    input features or channels; or of each of them by itself. Inputs count that were seen with gradients enabled, since
    the power was last asked for. Hooks are copied and pickled with their model.

    Args:
        model: Whose layers.
        norm: "l2" for squares, "l1" for absolute values.
        granularity: "layer", or "in_channel" for each feature or channel by itself.
        average_over: Ranks (a torch.distributed process group) that see other parts of a batch, as those of
            data-parallel training do; the powers are then those of all, and all ranks must step. None: this rank's.

    Raises:
        ValueError: For another norm or granularity.
        TypeError: If it is no model.
    """

    norm: str
    granularity: str
    average_over: ProcessGroup | None

    def __init__(
        self, model: nn.Module, norm: str = L2, granularity: str = LAYER, average_over: ProcessGroup | None = None
    ) -> None:
        checks.kind("model", model, nn.Module, "a torch.nn.Module")
        _check(norm, granularity)
        self.norm, self.granularity, self.average_over = norm, granularity, average_over
        self._layers: list[tuple[Layer, _Hook]] = []
        for module in filter(_is_layer, model.modules()):
            hook = next(iter(self._hooks_of(module)), None)
            if hook is None:
                hook = _Hook(norm, granularity)
                module.register_forward_pre_hook(hook)
            self._layers.append((module, hook))

    def _hooks_of(self, module: nn.Module) -> Iterator[_Hook]:
        """Those that measure the same; a copy of a model brings its own."""
        for hook in _hooks(module).values():
            if isinstance(hook, _Hook) and (hook.norm, hook.granularity) == (self.norm, self.granularity):
                yield hook

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for module, hook in self._layers:
            for key in [key for key, value in _hooks(module).items() if value is hook]:
                del module._forward_pre_hooks[key]
        self._layers = []

    def take(self) -> list[Power]:
        """Parameters, their layers, and the powers of what they have seen; counting begins anew.

        Waits for no device.
        """
        weights: dict[int, list[tuple[Layer, _Hook]]] = {}
        for module, hook in self._layers:
            weights.setdefault(id(module.weight), []).append((module, hook))
        found: list[Seen] = []
        for of_one in weights.values():  # layers that share a weight, or one alone
            seen = [(hook.total, hook.count) for _, hook in of_one if hook.total is not None]
            for _, hook in of_one:
                hook.total, hook.count = None, 0
            found.append((of_one[0][0], seen))
        if self.average_over is not None:
            return self._of_all_ranks(found)
        powers: list[Power] = []
        for module, seen in found:
            if count := sum(count for _, count in seen):
                power = torch.stack([total for total, _ in seen]).sum(0) / count
                powers.append((module.weight, module, power))
        return powers

    def _of_all_ranks(self, found: list[Seen]) -> list[Power]:
        """Sums and counts are added up over ranks; NaN of layers that none has seen anything of."""
        parts: list[Tensor] = []
        for module, seen in found:
            device = memory.local(module.weight).device
            width = module.weight.shape[1] * getattr(module, "groups", 1) if self.granularity == IN_CHANNEL else 1
            total = sum((total.to(device).reshape(-1).float() for total, _ in seen), torch.zeros(width, device=device))
            parts.append(torch.cat([total, torch.tensor([float(sum(count for _, count in seen))], device=device)]))
        if not parts:
            return []
        everything = torch.cat([part.to(parts[0].device) for part in parts])
        dist.all_reduce(everything, group=self.average_over)
        pieces = cast("Sequence[Tensor]", everything.split([len(part) for part in parts]))
        powers: list[Power] = []
        for (module, _), part in zip(found, pieces, strict=True):
            power = part[:-1] / part[-1]
            powers.append((module.weight, module, power if self.granularity == IN_CHANNEL else power[0]))
        return powers


class NSGD(FusedOptimizer):
    """SGD whose step is divided by the power of the input of the layer that a parameter is of (NLMS for layers).

    ``p <- p - lr d / (eps + P)``, with d that of SGD with momentum and P the mean of ``|x|^2``, or with ``norm="l1"``
    of ``|x|_1``, over the inputs x that the layer has seen since the last step; with ``granularity="in_channel"`` each
    input feature or channel has a P of its own. Weights of Linear and Conv layers are normalised; other parameters are
    stepped as SGD with momentum steps them, and so is everything without a model.

    Args:
        params: A model, whose parameters are stepped and whose layers are hooked; or parameters, (name, parameter)
            pairs, or dicts of param groups, with a ``collector``.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor; 0 for none.
        dampening: Of the gradient's part in the momentum, from the second step on.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        nesterov: Nesterov momentum; needs momentum, and no dampening.
        eps: Added to the power; with ``log``, the least that a step is divided by.
        norm: "l2" or "l1"; see ``fusedopt.InputPowers``.
        granularity: "layer" or "in_channel".
        power_beta: Divide by a running average of the power, ``beta P + (1 - beta) P_t``, whose bias is corrected.
        log: Divide by ``max(log P, eps)``.
        collector: An ``fusedopt.InputPowers``, in place of ``norm`` and ``granularity``.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.
        TypeError: If the collector is none.

    Example:
        >>> optimizer = fusedopt.NSGD(model, lr=0.1)

    Reference:
        Atici, Pan and Cetin, arXiv 2212.09921; the form is that of the authors' description.
    """

    rule: type[Rule] = NSGDRule
    _collector: InputPowers | None = None

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        eps: float = 1e-2,
        norm: str = L2,
        granularity: str = LAYER,
        power_beta: float | None = None,
        log: bool = False,
        collector: InputPowers | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        if collector is not None:
            checks.kind("collector", collector, InputPowers, "a fusedopt.InputPowers")
        _check(norm, granularity)
        taken = {name: value for name, value in locals().items() if name not in ("norm", "granularity", "collector")}
        if collector is None and isinstance(params, nn.Module):
            collector = InputPowers(params, norm, granularity)
        per_channel = (collector.granularity if collector else granularity) == IN_CHANNEL
        params = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(params, **arguments(taken, per_channel=per_channel))
        self._collector = collector
        self.steps_together = "the powers are taken from the hooks by step()" if collector else ""

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group):
            beta = param_group.get("power_beta", self.defaults["power_beta"])
            if beta is not None and not 0 <= checks.number(beta, "power_beta", "") < 1:
                raise ValueError(f"power_beta is {beta!r}; it must lie in [0, 1), or be None")
        super().add_param_group(param_group)

    def _before_step(self) -> None:
        if self._collector is not None:
            self._scale(self._collector)

    @torch.no_grad()
    def _scale(self, collector: InputPowers) -> None:
        """Put what the collector has found into the states."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for p, module, power in collector.take():
            group = groups.get(id(p))
            if group is None or p.grad is None:
                continue
            state = self.state[p]
            if group["power_beta"] is not None:
                power = _averaged(state, power, float(group["power_beta"]))
            eps = float(group["eps"])
            scale = 1 / (power.log().clamp(min=eps) if group["log"] else eps + power)
            if not group["per_channel"]:
                _put(state, "scale", scale)
                continue
            if "channel_scale" not in state:
                dtype = torch.promote_types(p.dtype, torch.float32)
                state["channel_scale"] = torch.ones_like(p, dtype=dtype, memory_format=torch.preserve_format).detach()
            channels = memory.local(state["channel_scale"])
            scale = _spread(scale, module, memory.local(p)).to(channels.device)
            channels.copy_(torch.where(scale.isnan(), channels, scale))

    def remove_hooks(self) -> None:
        """Take the hooks off the model; steps go on with the powers that were found last."""
        if self._collector is not None:
            self._collector.remove()

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_collector": self._collector, "steps_together": self.steps_together}


def _put(state: ParamState, name: str, value: Tensor) -> None:
    """A scalar into the state, in place if it is there."""
    if name not in state:
        state[name] = torch.ones((), dtype=_wide(value), device=value.device)
    value = value.reshape(()).to(state[name], non_blocking=True)
    state[name].copy_(torch.where(value.isnan(), state[name], value))


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64


def _averaged(state: ParamState, power: Tensor, beta: float) -> Tensor:
    """The running average of powers, which is kept in ``input_power``, corrected for its bias as it goes on."""
    if "input_power" not in state or "step" not in state:
        state["input_power"] = power.clone()
        return power
    kept, steps = state["input_power"], state["step"].to(power.device, _wide(power), non_blocking=True) + 1
    weight = (1 - beta) / (1 - beta**steps)
    moved = torch.where(power.isnan(), kept, kept + (power - kept) * weight)
    return kept.copy_(torch.where(kept.isnan(), power, moved))


def _spread(channels: Tensor, module: Layer, p: Tensor) -> Tensor:
    """What each input channel has, to the elements of a weight."""
    groups = getattr(module, "groups", 1)
    own = channels.reshape(groups, 1, -1).expand(groups, p.shape[0] // groups, -1).reshape(p.shape[0], -1)
    if own.shape[1] != p.shape[1]:
        raise RuntimeError(
            f"a weight of shape {tuple(p.shape)} here has a layer with {channels.numel()} input channels: "
            "granularity='in_channel' steps no weights that are sharded along their input"
        )
    return own.reshape([*own.shape, *[1] * (p.dim() - 2)]).expand_as(p)
