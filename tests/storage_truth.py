"""One step of AdamW by the slow model, and how far a step of ours may be from it."""

import math

import numpy as np
import storage_model as model
import torch


class Truth:
    """One step of AdamW in double, from what an optimizer's state holds before it."""

    def __init__(self, optimizer, params, master):
        self.before = []
        for i, p in enumerate(params):
            if p.grad is None:
                self.before.append(None)
                continue
            state = optimizer.state.get(p, {})
            has = "exp_avg" in state
            m = model.read(state["exp_avg"], state, "exp_avg", True) if has else np.zeros(p.shape)
            v = model.read(state["exp_avg_sq"], state, "exp_avg_sq", False) if has else np.zeros(p.shape)
            # A master that is yet to be made is the parameter.
            value = model.read_param(p, state, master if has else None)
            step = int(state["step"]) if has else 0
            words = {
                name: model.words(optimizer, i, p, name, step)
                for name in ("param", "exp_avg", "exp_avg_sq")
                if master == "stochastic"
            }
            group = next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
            self.before.append((value, m, v, p.grad.double().numpy(), step + 1, words, dict(group)))

    def after(self, i):
        """Of a parameter: its value and both moments, each with what rounding errors are relative to; and words."""
        p, m, v, g, t, words, group = self.before[i]
        (b1, b2), lr = group["betas"], group["lr"]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            of_m = np.abs(m) + np.abs(g)
            m = m + (1 - b1) * (g - m)
            v = b2 * v + (1 - b2) * g * g
            divisor = (1 - b1**t) * (np.sqrt(v) / math.sqrt(1 - b2**t) + group["eps"])
            of_p = np.abs(p) + lr * of_m / divisor
            p = p * (1 - lr * group["weight_decay"]) - lr * m / divisor
            return (p, of_p), (m, of_m), (v, v), words


def error_of(magnitude):
    """Some roundings of float32, which has nothing below 1e-45."""
    return 4e-6 * np.nan_to_num(magnitude, nan=0, posinf=0) + 4e-45


def close(found, truth, magnitude):
    found = np.asarray(found, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(found - truth)
    return ((gap <= error_of(magnitude)) | (np.isnan(found) & np.isnan(truth)) | (found == truth)).all()


def around(value, magnitude):
    """What may be had in place of a value."""
    error = error_of(magnitude)
    return value - error, value, value + error


def check_half(t, value, magnitude, words):
    """A half is the value rounded; where the value may be another, any of them is."""
    rounding = model.nearest_even if words is None else lambda x: model.by_words(x, words)
    found = model.from_bits(model.bf16(t)[1] << 16)
    either = np.stack([model.from_bits(rounding(np.float32(x)) << 16) for x in around(value, magnitude)])
    assert ((found >= either.min(0)) & (found <= either.max(0)) | np.isnan(found) & np.isnan(value)).all()


def check_param(p, state, master, truth, words):
    value, magnitude = truth
    if p.dtype == torch.float32:
        assert close(p.detach().numpy(), value, magnitude)
    if master in ("fp32", "split"):
        kept = model.read_param(p, state, master)
        assert close(kept, value, magnitude)
        rounded = model.half_away(np.float32(kept))
        assert p.dtype == torch.float16 or (model.bf16(p)[1] == rounded).all()
        assert p.dtype == torch.bfloat16 or torch.allclose(p.detach(), state["master"].half(), 0, 0, equal_nan=True)
    elif p.dtype == torch.bfloat16:
        check_half(p, value, magnitude, words.get("param"))


def check_state(state, name, signed, truth, words):
    t, (value, magnitude) = state[name], truth
    if t.dtype == torch.float32:
        assert close(t.numpy(), value, magnitude)
    elif t.dtype == torch.bfloat16:
        check_half(t, value, magnitude, words.get(name))
    else:
        scales = state[f"{name}_scale"]
        expected = model.scales_of(value)
        assert scales.dtype == torch.float32 and scales.numel() == len(expected)
        scales = scales.double().numpy().ravel()
        assert close(scales, expected, model.scales_of(magnitude))
        codes = t.numpy().astype(np.float64)
        either = np.stack([model.quantize(x, scales, signed) for x in around(value, magnitude)])
        assert (codes >= either.min(0) - 0.501).all() and (codes <= either.max(0) + 0.501).all()
        assert signed or (codes[value > 1e-44] >= 1).all()


def check_step(optimizer, params, truth, master):
    for i, p in enumerate(params):
        if truth.before[i] is None:
            continue
        state = optimizer.state[p]
        value, m, v, words = truth.after(i)
        check_param(p, state, master, value, words)
        check_state(state, "exp_avg", True, m, words)
        check_state(state, "exp_avg_sq", False, v, words)
