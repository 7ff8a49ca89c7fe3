"""Others' Muon with an AdamW beside it: torch's two, and the classes that have both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Peer, from_module
from fusedopt.verification import oracles

# Whoever rounds to bfloat16, the iteration magnifies it where singular values are small.
DIFFERS = "its matrix function rounds to bfloat16, matrix by matrix"


class Pair(torch.optim.Optimizer):
    """torch.optim.Muon and a fused torch.optim.AdamW, stepped one after the other."""

    def __init__(self, groups: Groups, adamw: dict[str, Any], **muon: Any) -> None:
        matrices, others = _apart(groups)
        self._both = [torch.optim.Muon(matrices, **muon)] if matrices else []
        self._both += [torch.optim.AdamW(others, **adamw, fused=True)] if others else []
        super().__init__([group for one in self._both for group in one.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """A step of both."""
        for one in self._both:
            one.step()
            self.state.update(one.state)


def _apart(groups: Groups) -> tuple[Groups, Groups]:
    """Groups of matrices, and of others, of which torch's refuse each other's; convolutions as matrices."""
    plain = [{key: value for key, value in group.items() if key != "algorithm"} for group in groups]
    are_matrices = [group["algorithm"] == "muon" for group in groups]
    matrices = [group for group, is_one in zip(plain, are_matrices, strict=True) if is_one]
    for group in matrices:
        group["params"] = [_flattened(p) for p in group["params"]]
    return matrices, [group for group, is_one in zip(plain, are_matrices, strict=True) if not is_one]


def _flattened(p: torch.Tensor) -> torch.Tensor:
    """A parameter as a matrix, with the same memory."""
    if p.dim() == 2:
        return p
    flat = p.detach().flatten(1).requires_grad_()
    flat.grad = p.grad.flatten(1)
    return flat


def _marked(make: Callable[..., torch.optim.Optimizer], groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """Of classes that know matrices by a flag."""
    return make(
        [{**_without_algorithm(group), "use_muon": group["algorithm"] == "muon"} for group in groups], **options
    )


def _without_algorithm(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "algorithm"}


def _jordan(groups: Groups, adamw: dict[str, Any], momentum: float, **_: Any) -> torch.optim.Optimizer:
    """The author's, whose groups must have these keys and no others."""
    more = {True: {"momentum": momentum}, False: {key: adamw[key] for key in ("betas", "eps")}}
    marked = [
        {**_without_algorithm(group), **more[group["algorithm"] == "muon"], "use_muon": group["algorithm"] == "muon"}
        for group in groups
    ]
    return from_module("muon", "SingleDeviceMuonWithAuxAdam")(marked)


def _timm(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    optimizer = oracles.find("timm:Muon")
    if optimizer is None:
        raise ImportError("timm has no Muon here")
    for group in groups:
        group["nesterov"] = options["nesterov"] and group["use_muon"]  # else it has NAdamW beside it
    return optimizer(groups, **options)


def peers(case: Case, device: str) -> list[Peer]:
    """What there is of Muon."""
    if case.name != "Muon":
        return []
    options, adamw = dict(case.own), case.own["adamw"]
    jordan = {"adamw": adamw, "momentum": options["momentum"]}
    timms = {key: options[key] for key in ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")}
    timms |= {"betas": adamw["betas"], "ns_coefficients": "original"}
    theirs = {"momentum": options["momentum"], "nesterov": options["nesterov"], "ns_steps": options["ns_steps"]}
    theirs |= {"weight_decouple": True, "adamw_betas": adamw["betas"], "adamw_eps": adamw["eps"]}
    return [
        Peer("torch-pair", "torch", Pair, options, differs=DIFFERS),
        Peer("muon", "muon-optimizer", _jordan, jordan, differs=DIFFERS, most_dims=2),
        Peer("timm-muon", "timm", partial(_marked, _timm), timms, differs=DIFFERS),
        Peer(
            "pytorch-optimizer-muon",
            "pytorch_optimizer",
            partial(_marked, from_module("pytorch_optimizer", "Muon")),
            theirs,
            differs=DIFFERS,
        ),
    ]
