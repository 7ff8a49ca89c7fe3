"""Textbook loops that step all tensors at once, else as those of references.py; also told the losses of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt import noise
from fusedopt.aliases import Memory
from fusedopt.verification.references import norm

Many = list[Tensor]


def koalav(params: Many, grads: list[Tensor | None], xs: list[Memory], h: Memory, losses: Tensor) -> Many:
    """Davtyan et al. 2022, algorithm 1, with the layers' own innovations of the authors' code; all tensors at once."""
    x, stepped, most = xs[0], list(params), 0.0
    x["s"] = x.get("s", h["sigma"]) + h["q"]
    uncertainty = _measurement_noise(x, h, losses)
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        if g is not None and float(norm(g)) >= 1e-9:
            f = g + h["weight_decay"] * p
            loss, square = float(losses.mean()) + 0.5 * h["weight_decay"] * float(norm(p)) ** 2, float(norm(f)) ** 2
            innovation = x["s"] * square + uncertainty
            stepped[k] = p - h["lr"] * x["s"] / innovation * loss * (g if h["match_reference"] else f)
            most = max(most, square / innovation)
    x["s"] -= x["s"] ** 2 * most
    return stepped


def koalam(params: Many, grads: list[Tensor | None], xs: list[Memory], h: Memory, losses: Tensor) -> Many:
    """The same, algorithm 2: predicted, then corrected. The covariance is a matrix in double."""
    x, most = xs[0], 0.0
    zero = [torch.zeros_like(p) for p in params]
    u, e = x.get("u", zero), x.get("e", zero)
    drift = math.sqrt(sum(float(norm(a - p)) ** 2 for a, p in zip(e, params, strict=True)))
    stepped, u = [p + v for p, v in zip(params, u, strict=True)], [h["a"] * v for v in u]
    x["qw"] = 0.9 * x.get("qw", h["q"]) + 0.1 * drift / sum(p.numel() for p in params)
    f = torch.tensor([[1, 1], [0, h["a"]]], dtype=torch.float64)
    covariance = x.get("P", torch.diag(torch.tensor([h["sw"], h["sv"]], dtype=torch.float64)))
    covariance = f @ covariance @ f.T + torch.diag(torch.tensor([x["qw"], h["qv"]], dtype=torch.float64))
    uncertainty, column = _measurement_noise(x, h, losses), [float(c) for c in covariance[:, 0]]
    for k, (p, g) in enumerate(zip(list(stepped), grads, strict=True)):
        if g is not None and float(norm(g)) >= 1e-9:
            slope = g + h["weight_decay"] * p
            square = float(norm(slope)) ** 2
            innovation = column[0] * square + uncertainty
            loss = float(losses.mean()) + 0.5 * h["weight_decay"] * float(norm(p)) ** 2
            stepped[k] = p - h["lr"] * column[0] / innovation * loss * slope
            u[k] = u[k] - h["lr"] * column[1] / innovation * loss * slope
            e = [0.9 * a + 0.1 * stepped[k] if i == k else a for i, a in enumerate(e)]
            most = max(most, square / innovation)
    x["u"], x["e"], x["P"] = u, e, covariance - most * torch.outer(covariance[:, 0], covariance[:, 0])
    return stepped


def prodigy(params: Many, grads: list[Tensor | None], xs: list[Memory], h: Memory, losses: Tensor) -> Many:
    """Mishchenko and Defazio 2024, the version for Adam, with the options of their code; all tensors at once."""
    x, (b1, b2), k = xs[0], h["betas"], xs[0].get("k", 0) + 1
    d, d0, decay = x.get("d", h["d0"]), h["d0"], h["weight_decay"]
    corrected = math.sqrt(1 - b2**k) / (1 - b1**k) if h["use_bias_correction"] else 1.0
    gamma = d * h["lr"] * corrected
    weight, along, length = (d if h["safeguard_warmup"] else gamma), 0.0, 0.0
    live = {i: g if h["decouple"] else g + decay * params[i] for i, g in enumerate(grads) if g is not None}
    for i, g in live.items():
        own, zero = xs[i], torch.zeros_like(g)
        along += gamma * float((g * (own.setdefault("p0", params[i]) - params[i])).sum())
        own["m"] = b1 * own.get("m", zero) + (1 - b1) * d * g
        own["v"] = b2 * own.get("v", zero) + (1 - b2) * d**2 * g**2
        own["s"] = h["beta3"] * own.get("s", zero) + d / d0 * weight * g
        length += float(own["s"].abs().sum())
    if length == 0:
        return params
    x["r"] = h["beta3"] * x.get("r", 0.0) + d / d0 * along
    estimate = h["d_coef"] * x["r"] / length
    x["most"] = max(x.get("most", d0), estimate)
    x["d"] = min(x["most"], max(d, estimate) * h["growth_rate"] if d == d0 else d * h["growth_rate"])
    x["k"], stepped = k, list(params)
    for i in live:
        p = params[i] * (1 - gamma * decay) if h["decouple"] else params[i]
        stepped[i] = p - gamma * xs[i]["m"] / (xs[i]["v"].sqrt() + x["d"] * h["eps"])
    return stepped


def entropy_sgd(params: Many, grads: list[Tensor | None], xs: list[Memory], h: Memory, losses: Tensor) -> Many:
    """Chaudhari et al. 2017, algorithm 1, a step of its inner loop; momenta and no factor gamma as in their code."""
    at, stepped, eta = xs[0], list(params), h["inner_lr"]
    inner, loops = at.get("inner", 0), at.get("loops", 0)
    gamma, momentum, within = h["gamma0"] * (1 + h["gamma1"]) ** loops, h["momentum"], h["inner_momentum"]
    for k, g in enumerate(grads):
        x, p = xs[k], params[k]
        if inner == 0 or "anchor" not in x:
            x["anchor"] = x["mu"] = p
            x["b"] = torch.zeros_like(p)
        if g is None:
            continue
        drawn = noise.normal(noise.elements(p), x["number"], x.get("drawn", 0), (h["seed"], noise.GRADIENT))
        x["drawn"] = x.get("drawn", 0) + 1
        g = g + (h["noise"] / math.sqrt(eta) * drawn).to(p.dtype) + h["weight_decay"] * p
        x["b"] = within * x["b"] + g
        g = g + within * x["b"] if h["nesterov"] else x["b"]
        stepped[k] = p - eta * (g - gamma * (x["anchor"] - p))
        x["mu"] = h["alpha"] * x["mu"] + (1 - h["alpha"]) * stepped[k]
        if inner + 1 == h["L"]:
            d = x["anchor"] - x["mu"]
            x["outer"] = momentum * x.get("outer", torch.zeros_like(p)) + d
            d = d + momentum * x["outer"] if h["nesterov"] else x["outer"]
            stepped[k] = x["anchor"] - h["lr"] * d
            x["anchor"] = x["mu"] = stepped[k]
    at["inner"], at["loops"] = (0, loops + 1) if inner + 1 == h["L"] else (inner + 1, loops)
    return stepped


def replicated_sgd(params: Many, grads: list[Tensor | None], xs: list[Memory], h: Memory, losses: Tensor) -> Many:
    """Heavy ball or Nesterov's on ``sum_a L(w_a) + gamma/2 sum_a |w_a - mean|^2`` (Pittorino et al. 2021)."""
    t, stepped = xs[0].get("t", 0), list(params)
    xs[0]["t"] = t + 1
    for k, g in enumerate(grads):
        if g is None:
            continue
        p, x = params[k], xs[k]
        g = g + h["weight_decay"] * p
        if h["replicas"] > 1:
            g = g + h["gamma0"] * (1 + h["gamma1"]) ** t * (p - p.mean(0))
        if h["momentum"]:
            x["b"] = h["momentum"] * x["b"] + (1 - h["dampening"]) * g if "b" in x else g
            g = g + h["momentum"] * x["b"] if h["nesterov"] else x["b"]
        stepped[k] = p - h["lr"] * g
    return stepped


def _measurement_noise(x: Memory, h: Memory, losses: Tensor) -> float:
    x["r"] = 0.9 * x.get("r", 1.0) + 0.1 * float((losses**2).mean()) if h["online"] else h["r"]
    return x["r"]
