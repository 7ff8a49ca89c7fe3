"""Which weights of a model may be of any length, because a normalisation follows their layer."""

# The bases of normalisations and convolutions have no public names, nor do lists of parameters.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, fx, nn
from torch.nn import functional as F

from fusedopt import checks
from fusedopt.aliases import ParamGroup
from fusedopt.options import CHANNEL, RESCALE, TENSOR

# A normalisation of each channel takes a bias out again; others do not.
BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
BY_TENSOR = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FUNCTIONS: dict[Callable[..., object], str] = {
    F.batch_norm: CHANNEL,
    F.instance_norm: CHANNEL,
    F.layer_norm: TENSOR,
    F.group_norm: TENSOR,
    F.rms_norm: TENSOR,
}
# What may stand between: it multiplies, and knows no length.
BETWEEN = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def scale_invariant_groups(model: nn.Module, *, tracer: fx.Tracer | None = None) -> list[ParamGroup]:
    """A model's parameters in groups, of which those say ``rescale`` whose length does not matter.

    The model is traced symbolically, so that what follows a layer is what its ``forward`` does with it, not what was
    registered next. A weight of a Linear or Conv layer is scale-invariant where all that its output goes to, but for
    dropout, is a normalisation: of "channel" where that is a BatchNorm or InstanceNorm (of a transposed convolution,
    whose dimension 0 are inputs, "tensor"), of "tensor" where it is a LayerNorm, GroupNorm or RMSNorm and the layer has
    no bias. Layers that share a weight must all be followed so.

    Args:
        model: To be traced by ``torch.fx.Tracer``.
        tracer: Another tracer, with other modules as leaves.

    Returns:
        At most three groups of (name, parameter) pairs, for any optimizer of this package: those rescaled by channel,
        those by tensor, and all others.

    Raises:
        TypeError: If it is no model.
        RuntimeError: If it cannot be traced.

    Example:
        >>> optimizer = fusedopt.SGD(fusedopt.scale_invariant_groups(model), lr=0.1, momentum=0.9)

    Reference:
        Liu et al., arXiv 2102.03497 (WeightRescaling); Kodryan et al., NeurIPS 2022 (training on the sphere).
    """
    checks.kind("model", model, nn.Module, "a torch.nn.Module")
    try:
        graph = (tracer or fx.Tracer()).trace(model)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); give groups with 'rescale' yourself"
        ) from error
    found = _kinds(model, graph)
    groups: dict[str | None, list[tuple[str, Tensor]]] = {CHANNEL: [], TENSOR: [], None: []}
    for name, p in model.named_parameters():
        groups[found.get(id(p)) if p.requires_grad else None].append((name, p))
    return [{"params": params, **({RESCALE: kind} if kind else {})} for kind, params in groups.items() if params]


def _kinds(model: nn.Module, graph: fx.Graph) -> dict[int, str]:
    """How weights are invariant, by their ids: those that are in all their uses."""
    modules = dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False)))
    uses: dict[int, list[str | None]] = {}
    for node in graph.nodes:
        for p, kind in _uses(model, modules, node):
            uses.setdefault(id(p), []).append(kind)
    known = ((key, set(kinds)) for key, kinds in uses.items())
    return {key: CHANNEL if kinds == {CHANNEL} else TENSOR for key, kinds in known if None not in kinds}


def _uses(model: nn.Module, modules: dict[str, nn.Module], node: fx.Node) -> Iterable[tuple[Tensor, str | None]]:
    """The parameters that a node uses, and how each is invariant there; None where it is not."""
    if node.op == "get_attr":
        value: object = model
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return [(value, None)] if isinstance(value, nn.Parameter) else []
    if node.op != "call_module":
        return []
    module = modules[str(node.target)]
    weight = module._parameters.get("weight") if isinstance(module, LAYERS) else None
    kind = _followed(modules, node) if weight is not None else None
    if kind == CHANNEL and getattr(module, "transposed", False):
        kind = TENSOR
    elif kind == TENSOR and module._parameters.get("bias") is not None:
        kind = None
    return [(p, kind if p is weight else None) for p in module.parameters()]


def _followed(modules: dict[str, nn.Module], node: fx.Node) -> str | None:
    """How all that a node's output goes to normalises it."""
    kinds = {_normalises(modules, node, user) for user in node.users}
    return (CHANNEL if kinds == {CHANNEL} else TENSOR) if kinds and None not in kinds and len(kinds) == 1 else None


def _normalises(modules: dict[str, nn.Module], node: fx.Node, user: fx.Node) -> str | None:
    first = user.args[0] if user.args else user.kwargs.get("input")
    others = [x for x in user.all_input_nodes if x is node]
    if first is not node or len(others) != 1:
        return None
    if user.op == "call_function":
        return FUNCTIONS.get(user.target) if callable(user.target) else None
    if user.op != "call_module":
        return None
    module = modules[str(user.target)]
    if isinstance(module, BY_CHANNEL):
        of = modules.get(str(node.target)) if node.op == "call_module" else None
        width = getattr(of, "out_channels", getattr(of, "out_features", module.num_features))
        return CHANNEL if width == module.num_features else None
    if isinstance(module, BY_TENSOR):
        return TENSOR
    return _followed(modules, user) if isinstance(module, BETWEEN) else None
