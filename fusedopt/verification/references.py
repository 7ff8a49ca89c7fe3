"""Textbook loops, one tensor and one step at a time, in the tensor's own dtype.

Written from the equations of the papers or of the packages named, and from nothing in this package:
they are what its rules are judged by where no other implementation is installed. ``x`` is a tensor's
state; ``h`` the group's options.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fusedopt.aliases import Memory


def sgd(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Heavy ball and Nesterov momentum as torch.optim.SGD documents them."""
    g = _l2(p, g, h)
    if h["momentum"]:
        x["b"] = h["momentum"] * x["b"] + (1 - h["dampening"]) * g if "b" in x else g.clone()
        g = g + h["momentum"] * x["b"] if h["nesterov"] else x["b"]
    return _decay(p, h) - h["lr"] * g


def adagrad(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Duchi et al. 2011, with torch's lr_decay."""
    g, t = _l2(p, g, h), _tick(x)
    x["s"] = x.get("s", torch.full_like(p, h["initial_accumulator_value"])) + g**2
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (x["s"].sqrt() + h["eps"])


def rmsprop(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Hinton's lecture 6.5; centered as Graves 2013."""
    g, zero = _l2(p, g, h), torch.zeros_like(p)
    a = h["alpha"]
    x["v"] = a * x.get("v", zero) + (1 - a) * g**2
    variance = x["v"]
    if h["centered"]:
        x["m"] = a * x.get("m", zero) + (1 - a) * g
        variance = (x["v"] - x["m"] ** 2).clamp(min=0)
    u = g / (variance.sqrt() + h["eps"])
    if h["momentum"]:
        x["b"] = u = h["momentum"] * x.get("b", zero) + u
    return p - h["lr"] * u


def adam(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Kingma and Ba 2015; Loshchilov and Hutter 2019; AMSGrad over the raw second moment, as torch."""
    g, t = _l2(p, g, h), _tick(x)
    (b1, b2), w = h["betas"], _moments(p, g, x, h, h["amsgrad"])
    return _decay(p, h) - h["lr"] * (x["m"] / (1 - b1**t)) / ((w / (1 - b2**t)).sqrt() + h["eps"])


def adam_product(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Zou et al. 2019's generic Adam, corrected by the products of its betas."""
    g, (b1, b2) = _l2(p, g, h), h["betas"]
    w = _moments(p, g, x, h, h["amsgrad"])
    x["products"] = one, two = [b * before for b, before in zip((b1, b2), x.get("products", (1.0, 1.0)), strict=True)]
    return _decay(p, h) - h["lr"] * (x["m"] / (1 - one)) / ((w / (1 - two)).sqrt() + h["eps"])


def nadam(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Dozat 2016 with the schedule of torch.optim.NAdam."""
    g, t = _l2(p, g, h), _tick(x)
    (b1, b2), v = h["betas"], _moments(p, g, x, h)
    mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * h["momentum_decay"])) for s in (t, t + 1))
    x["product"] = product = x.get("product", 1.0) * mu
    numerator = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * x["m"]
    return _decay(p, h) - h["lr"] * numerator / ((v / (1 - b2**t)).sqrt() + h["eps"])


def nadamw(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Choi et al. 2019, table 1, with decoupled decay."""
    t = _tick(x)
    (b1, b2), v = h["betas"], _moments(p, g, x, h)
    n = b1 * x["m"] + (1 - b1) * g
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * (n / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + h["eps"])


def radam(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Liu et al. 2020 with the threshold and fallback of torch.optim.RAdam."""
    g, t = _l2(p, g, h), _tick(x)
    (b1, b2), v = h["betas"], _moments(p, g, x, h)
    m = x["m"] / (1 - b1**t)
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    if length > 5:
        top, bottom = (length - 4) * (length - 2) * longest, (longest - 4) * (longest - 2) * length
        m = m * math.sqrt(top / bottom) * math.sqrt(1 - b2**t) / (v.sqrt() + h["eps"])
    return _decay(p, h) - h["lr"] * m


def adabound(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Luo et al. 2019 in the form of the authors' code."""
    g, t = _l2(p, g, h), _tick(x)
    (b1, b2), w = h["betas"], _moments(p, g, x, h, h["amsbound"])
    final = h["final_lr"] * h["lr"] / h["base_lr"]
    low, high = final * (1 - 1 / (h["gamma"] * t + 1)), final * (1 + 1 / (h["gamma"] * t))
    rate = h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) / (w.sqrt() + h["eps"])
    return _decay(p, h) - rate.clamp(low, high) * x["m"]


def adamax(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Kingma and Ba 2015, algorithm 2, with torch's eps."""
    g, t, zero = _l2(p, g, h), _tick(x), torch.zeros_like(p)
    b1, b2 = h["betas"]
    x["m"] = b1 * x.get("m", zero) + (1 - b1) * g
    x["u"] = torch.maximum(b2 * x.get("u", zero), g.abs() + h["eps"])
    return p - h["lr"] / (1 - b1**t) * x["m"] / x["u"]


def adadelta(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Zeiler 2012, algorithm 1, with torch's lr."""
    g, zero, rho = _l2(p, g, h), torch.zeros_like(p), h["rho"]
    x["v"] = rho * x.get("v", zero) + (1 - rho) * g**2
    before = x.get("a", zero)
    d = ((before + h["eps"]) / (x["v"] + h["eps"])).sqrt() * g
    x["a"] = rho * before + (1 - rho) * d**2
    return p - h["lr"] * d


def asgd(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Bottou's averaged SGD with the schedules of torch.optim.ASGD, which keeps eta and mu in float32."""
    g, t = _l2(p, g, h), _tick(x)
    eta, mu = (float(torch.tensor(value, dtype=torch.float32)) for value in x.get("next", (h["lr"], 1.0)))
    p = (1 - h["lambd"] * eta) * p - eta * g
    x["ax"] = p.clone() if mu == 1 else x["ax"] + mu * (p - x["ax"])
    x["next"] = h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"], 1 / max(1, t - h["t0"])
    return p


def rprop(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Riedmiller and Braun 1993 without backtracking: Igel and Huesken's iRprop-."""
    (shrink, grow), (smallest, largest) = h["etas"], h["step_sizes"]
    signs = g.sign() * x.get("sign", torch.zeros_like(p))
    size = x.get("size", torch.full_like(p, h["lr"]))
    size = torch.where(signs > 0, size * grow, torch.where(signs < 0, size * shrink, size))
    x["size"] = size.clamp(smallest, largest)
    x["sign"] = g.sign() * (signs >= 0)
    return p - x["size"] * x["sign"]


def lion(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Chen et al. 2023. Remembers where the sign hangs on rounding, in ``x["doubtful"]``."""
    b1, b2 = h["betas"]
    m = x.get("m", torch.zeros_like(p))
    c = b1 * m + (1 - b1) * g
    scale = (b1 * m).abs() + ((1 - b1) * g).abs()
    x["doubtful"] = x.get("doubtful", torch.zeros_like(p, dtype=torch.bool)) | ((c.abs() < 1e-5 * scale) & (c != 0))
    x["m"] = b2 * m + (1 - b2) * g
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * c.sign()


def lamb(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """You et al. 2020, algorithm 2, without a bound on the norm; timm and apex adapt what decays alone."""
    t = _tick(x)
    (b1, b2), v = h["betas"], _moments(p, g, x, h)
    u = (x["m"] / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + h["eps"]) + h["weight_decay"] * p
    ratio = norm(p) / norm(u) if _adapts(h) and norm(p) > 0 and norm(u) > 0 else 1.0
    return p - h["lr"] * ratio * u


def lars(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """You et al. 2017, algorithm 1, with torch's momentum; timm adapts what decays alone."""
    w, n, decay = norm(p), norm(g), h["weight_decay"]
    ratio = h["trust_coefficient"] * w / (n + decay * w + h["eps"]) if _adapts(h) and w > 0 and n > 0 else 1.0
    return sgd(p, ratio * (g + decay * p), x, {**h, "weight_decay": 0.0})


def adamp(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Heo et al. 2021, algorithm 2, in the form of the package adamp."""
    t, (b1, b2), v = _tick(x), h["betas"], _moments(p, g, x, h)
    m = b1 * x["m"] + (1 - b1) * g if h["nesterov"] else x["m"]
    u, ratio = _projected(p, g, m / (v.sqrt() / math.sqrt(1 - b2**t) + h["eps"]), h)
    return p * (1 - h["lr"] * h["weight_decay"] * ratio) - h["lr"] / (1 - b1**t) * u


def sgdp(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """The same, algorithm 1; without Nesterov the package projects the buffer."""
    x["b"] = h["momentum"] * x.get("b", torch.zeros_like(p)) + (1 - h["dampening"]) * g
    d, ratio = _projected(p, g, g + h["momentum"] * x["b"] if h["nesterov"] else x["b"], h)
    if not h["nesterov"]:
        x["b"] = d
    return p * (1 - h["lr"] * h["weight_decay"] * ratio / (1 - h["momentum"])) - h["lr"] * d


def norm(t: Tensor, dim: int | None = None) -> Tensor:
    """The L2 norm, of all elements or along a dimension."""
    return cast("Tensor", torch.linalg.vector_norm(t, dim=dim))


def _projected(p: Tensor, g: Tensor, u: Tensor, h: Memory) -> tuple[Tensor, float]:
    for rows in (len(p), 1) if p.dim() > 1 and p.numel() else ():
        q, f, w = (t.reshape(rows, -1) for t in (p, g, u))
        lengths = (norm(f, 1).clamp(min=h["eps"]), norm(q, 1).clamp(min=h["eps"]))
        cosines = (f * q).sum(1).abs() / (lengths[0] * lengths[1])
        if cosines.max() < h["delta"] / math.sqrt(q.shape[1]):
            n = q / (norm(q, 1)[:, None] + h["eps"])
            return (w - n * (n * w).sum(1, keepdim=True)).reshape(p.shape), h["wd_ratio"]
    return u, 1.0


def ademamix(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Pagliardini et al. 2025, algorithm 1; the half-life of the slow average is ``ln 0.5 / ln beta - 1`` steps."""
    t, (b1, b2, b3) = _tick(x), h["betas"]
    alpha = h["alpha"] * min(1.0, t / h["alpha_warmup"]) if h["alpha_warmup"] else h["alpha"]
    if t < h["beta3_warmup"]:
        first, last = (math.log(0.5) / math.log(b) - 1 for b in (b1, b3))
        b3 = 0.5 ** (1 / (first + (last - first) * t / h["beta3_warmup"] + 1))
    zero = torch.zeros_like(p)
    x["m"] = b1 * x.get("m", zero) + (1 - b1) * g
    x["n"] = b3 * x.get("n", zero) + (1 - b3) * g
    x["v"] = b2 * x.get("v", zero) + (1 - b2) * g**2
    d = (x["m"] / (1 - b1**t) + alpha * x["n"]) / ((x["v"] / (1 - b2**t)).sqrt() + h["eps"])
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * d


def adopt(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Taniguchi et al. 2024, algorithm 2, with the clipping of their code."""
    t, (b1, b2), decoupled = _tick(x), h["betas"], h["decoupled_weight_decay"]
    g = g if decoupled else g + h["weight_decay"] * p
    if t == 1:
        x["m"], x["v"] = torch.zeros_like(p), g**2
        return p
    n = g / x["v"].sqrt().clamp(min=h["eps"])
    n = n.clamp(-((t - 1) ** h["clip_exp"]), (t - 1) ** h["clip_exp"]) if h["clips"] else n
    x["m"], x["v"] = b1 * x["m"] + (1 - b1) * n, b2 * x["v"] + (1 - b2) * g**2
    return (p * (1 - h["lr"] * h["weight_decay"]) if decoupled else p) - h["lr"] * x["m"]


def adan(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Xie et al. 2024, algorithm 1, with the betas and both decays of their code."""
    t, (b1, b2, b3), zero = _tick(x), h["betas"], torch.zeros_like(p)
    change = g - x.get("g", g)
    x["m"] = b1 * x.get("m", zero) + (1 - b1) * g
    x["y"] = b2 * x.get("y", zero) + (1 - b2) * change
    x["v"] = b3 * x.get("v", zero) + (1 - b3) * (g + b2 * change) ** 2
    x["g"] = g
    d = (x["m"] / (1 - b1**t) + b2 * x["y"] / (1 - b2**t)) / ((x["v"] / (1 - b3**t)).sqrt() + h["eps"])
    decay = h["lr"] * h["weight_decay"]
    return p * (1 - decay) - h["lr"] * d if h["no_prox"] else (p - h["lr"] * d) / (1 + decay)


def schedule_free(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Defazio et al. 2024, algorithm 1, without its average, as their code does it; AdamW's if there are betas."""
    t, z, beta = _tick(x), x.get("z", p), h["betas"][0] if "betas" in h else h["momentum"]
    lr = h["lr"] * (min(1.0, t / h["warmup_steps"]) if h["warmup_steps"] else 1.0)
    x["most"] = max(x.get("most", 0.0), lr)
    weight = t ** h["r"] * x["most"] ** h["weight_lr_power"]
    x["sum"] = x.get("sum", 0.0) + weight
    c, u = weight / x["sum"], g
    if "betas" in h:
        b2 = h["betas"][1]
        x["v"] = b2 * x.get("v", torch.zeros_like(p)) + (1 - b2) * g**2
        u = g / ((x["v"] / (1 - b2**t)).sqrt() + h["eps"])
    u = u + h["weight_decay"] * p
    x["z"] = z - lr * u
    return (1 - c) * p + c * z - lr * (1 - beta * (1 - c)) * u


def muon(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Jordan et al. 2024, with torch's form of the momentum; by AdamW what is no matrix."""
    if h["algorithm"] == "adamw":
        return adam(p, g, x, {**h, "amsgrad": False, "decoupled_weight_decay": True})
    mu, (a, b, c) = h["momentum"], h["ns_coefficients"]
    x["m"] = mu * x.get("m", torch.zeros_like(p)) + (1 - mu) * g
    u = (1 - mu) * g + mu * x["m"] if h["nesterov"] else x["m"]
    o = u.double() / max(float(u.double().norm()), h["eps"])
    for _ in range(h["ns_steps"]):
        s = o @ o.T
        o = a * o + (b * s + c * s @ s) @ o
    rows, columns = p.shape
    is_like_adamw = h["adjust_lr_fn"] == "match_rms_adamw"
    r = 0.2 * math.sqrt(max(rows, columns)) if is_like_adamw else math.sqrt(max(1.0, rows / columns))
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * r * o.to(p.dtype)


def amsgd(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Topollai and Choromanska 2025: the step that minimises the larger of two planes and both proximal terms."""
    g, lam = _l2(p, g, h), h["lam"]
    d = x.get("d", g)
    a, b, c = ((u * v).sum() for u, v in ((g, g), (g, d), (d, d)))
    change = ((d - g) ** 2).sum()
    beta = ((a + 2 * lam * b - lam * c) / change).clamp(0, h["beta_max"]) if change > 0 else 0.0
    x["d"] = ((beta + lam) * d + (1 - beta) * g) / (1 + lam)
    return p - h["lr"] * x["d"]


def amadamw(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """The same in the metric of Adam's second moment, with decay as a proximal term."""
    t, lam, lr = _tick(x), h["lam"], h["lr"]
    q, mu = h.get("decaying", (p, h["weight_decay"]))
    zero = torch.zeros_like(p)
    x["v"] = h["beta2"] * x.get("v", zero) + (1 - h["beta2"]) * g**2
    product = x.get("product", 1.0)
    metric = (1 - h["beta_max"] * product) * ((x["v"] / (1 - h["beta2"] ** t)).sqrt() + h["eps"])
    d, weight = x.get("d", zero), 1 / (metric * (1 + lam * metric))
    if t == 1:
        beta = h["beta_max"]
    else:
        gap = x["lr"] / lr * (g * (d / metric + mu * q)).sum() if lr else 0.0
        top = (1 + mu * lr) * gap - ((d - g) * (g + lam * metric * d) * weight).sum() - mu * (q * (d - g)).sum()
        below = ((d - g) ** 2 * weight).sum()
        beta = float((top / below).clamp(0, h["beta_max"])) if below > 0 else 0.0
    x["d"] = ((1 - beta) * g + (lam * metric + beta) * d) / (1 + lam * metric)
    x["product"], x["lr"] = product * beta, lr
    return (1 - lr * h["weight_decay"]) * p - lr * x["d"] / metric


def swats(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Keskar and Socher 2017, algorithm 1, with coupled decay; schedules go on to scale the rate of SGD."""
    g, t, (b1, b2) = _l2(p, g, h), _tick(x), h["betas"]
    if "sgd" in x:
        x["b"] = b1 * x["b"] + g
        return p - (1 - b1) * x["sgd"] * h["lr"] / x["lr"] * x["b"]
    v = _moments(p, g, x, h)
    q = -h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) * x["m"] / (v.sqrt() + h["eps"])
    along = -(q * g).sum()
    if along != 0:
        rate = (q * q).sum() / along
        x["rate"] = b2 * x.get("rate", 0.0) + (1 - b2) * rate
        settled = x["rate"] / (1 - b2**t)
        if t > 1 and settled > 0 and abs(settled - rate) < h["tol"] + 1e-6 * abs(rate):
            x["sgd"], x["lr"], x["b"] = settled, h["lr"], torch.zeros_like(p)
    return p + q


def mbf(p: Tensor, g: Tensor, x: Memory, h: Memory) -> Tensor:
    """Bahamou et al. 2023: kernels and rows have blocks, the elements of vectors are blocks; inverted now and then."""
    t, n = _tick(x), p.shape[1] if p.dim() == 2 else p[0, 0].numel() if p.dim() > 2 else 1
    rows = g.reshape(-1, n)
    products = (rows.T @ rows / len(rows))[None] if p.dim() == 2 else rows[:, :, None] * rows[:, None, :]
    x["F"] = h["beta"] * x.get("F", torch.zeros_like(products)) + (1 - h["beta"]) * products
    x["b"] = h["momentum"] * x.get("b", torch.zeros_like(p)) + g
    if p.dim() < 2 or (t - 1) % h["inverse_every"] == 0:
        damping = h["damping"] * torch.eye(n, dtype=p.dtype)
        x["inverse"] = torch.linalg.inv(x["F"] / (1 - h["beta"] ** t) + damping)
    d = cast("Tensor", x["inverse"] @ x["b"].reshape(-1, n, 1)).reshape(p.shape)
    return p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * d


def _adapts(h: Memory) -> bool:
    return bool(h["weight_decay"] or h["always_adapt"])


def _l2(p: Tensor, g: Tensor, h: Memory) -> Tensor:
    return g if h.get("decoupled_weight_decay") else g + h["weight_decay"] * p


def _decay(p: Tensor, h: Memory) -> Tensor:
    return p * (1 - h["lr"] * h["weight_decay"]) if h.get("decoupled_weight_decay") else p


def _tick(x: Memory) -> int:
    x["t"] = x.get("t", 0) + 1
    return x["t"]


def _moments(p: Tensor, g: Tensor, x: Memory, h: Memory, maximum: bool = False) -> Tensor:
    b1, b2 = h["betas"]
    zero = torch.zeros_like(p)
    x["m"] = b1 * x.get("m", zero) + (1 - b1) * g
    x["v"] = b2 * x.get("v", zero) + (1 - b2) * g**2
    if not maximum:
        return x["v"]
    x["max"] = torch.maximum(x.get("max", zero), x["v"])
    return x["max"]
