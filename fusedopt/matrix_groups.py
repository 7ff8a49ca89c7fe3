"""Which parameters of a model Muon steps, and which AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fusedopt import checks
from fusedopt.aliases import ParamGroup
from fusedopt.optimizers.muon_stacks import is_matrix
from fusedopt.optimizers.muon_step import ADAMW, MUON

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def muon_groups(model: nn.Module, *, adamw: Iterable[str] = ()) -> list[ParamGroup]:
    """A model's parameters in groups for ``fusedopt.Muon``: matrices of hidden layers, and what AdamW steps.

    AdamW steps vectors and scalars, embeddings, the output layer, and whatever shares a parameter with these. The
    output layer is what ``model.get_output_embeddings()`` returns, if there is such a method and it returns anything;
    else the last of the model's layers, in the order in which they were registered, that has a matrix as its weight.

    Args:
        model: The model.
        adamw: Names of more parameters for AdamW; ``*`` stands for anything, as in ``"*.router.weight"``.

    Returns:
        One or two groups of (name, parameter) pairs with ``algorithm``, those of matrices first.

    Raises:
        TypeError: If it is no model.
        ValueError: If no parameter has a name of ``adamw``.

    Example:
        >>> optimizer = fusedopt.Muon(fusedopt.muon_groups(model), lr=0.02, adamw={"lr": 3e-4})
    """
    checks.kind("model", model, nn.Module, "a torch.nn.Module")
    patterns = [adamw] if isinstance(adamw, str) else list(adamw)
    named = list(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"adamw has {pattern!r}, and no parameter of the model is called so")
    apart = _embedded(model)
    groups: dict[str, list[tuple[str, Tensor]]] = {MUON: [], ADAMW: []}
    for name, p in named:
        is_hidden = is_matrix(p) and id(p) not in apart and not any(fnmatchcase(name, x) for x in patterns)
        groups[MUON if is_hidden else ADAMW].append((name, p))
    return [{"params": params, "algorithm": algorithm} for algorithm, params in groups.items() if params]


def _embedded(model: nn.Module) -> set[int]:
    """Parameters, by their identity, of embeddings and the output layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, EMBEDDINGS)]
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    if not isinstance(output, nn.Module):
        others = (layer for layer in model.modules() if not isinstance(layer, EMBEDDINGS))
        with_matrix = [layer for layer in others if any(is_matrix(p) for p in layer.parameters(recurse=False))]
        output = with_matrix[-1] if with_matrix else None
    layers += [output] if output is not None else []
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}
