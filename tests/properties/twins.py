"""Runs a program on an optimizer of ours and on torch's, which steps contiguous copies in double precision."""

import json
import math
import re
from collections import defaultdict
from contextlib import contextmanager

import torch

from properties.memory import bits, home
from properties.operations import SCALARS, Operations, tensors, wide

# Relative errors of one step. Torch keeps NAdam's product and ASGD's rates in float32.
ERRORS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ERRORS |= {torch.complex128: 1e-9, torch.complex64: 1e-5}
FLOAT_SCALARS = 1e-6
NORM = 1e-6  # a GPU sums the squares of a few narrow gradients in float32
WIDE = (torch.float64, torch.complex128)
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum")


def run(program, engine):
    """Raises where the two differ; what reproduces it is a note."""
    try:
        Twins(program, engine).run()
    except Exception as error:
        error.add_note(f"program: {json.dumps(program)}")
        raise


class Twins(Operations):
    """Both optimizers; each operation of a program is a method."""

    def run(self):
        for name, *arguments in self.program["ops"]:
            getattr(self, name)(*arguments)

    def step(self):
        norm = self.norm()
        clip, measures = self.a.max_grad_norm, self.a.max_grad_norm is not None or self.a.skip_nonfinite
        skips = self.a.skip_nonfinite and not math.isfinite(norm)
        stepped = [i for i, p in enumerate(self.ours) if p.grad is not None and not skips]
        with self.untouched(stepped):
            try:
                with self.untouched_by_error():
                    self.a.step()
            except (RuntimeError, TypeError, ValueError) as error:
                if not (re.search("conj|neg|lazi", str(error)) and self.resolve()):
                    raise
                self.a.step()
        if skips:
            self.skipped += 1
        else:
            self.step_theirs(clip)
        assert self.a.skipped_steps == self.skipped
        if measures:
            self.close(self.a.grad_norm.double(), torch.tensor(norm), NORM, 1e-12, "grad_norm")
        else:
            assert self.a.grad_norm is None
        for i in stepped:
            self.compare(i)

    def norm(self):
        """Of all their gradients, as torch measures it."""
        norms = [torch.linalg.vector_norm(q.grad) for q in self.theirs if q.grad is not None and q.grad.numel()]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def step_theirs(self, clip):
        for group in self.b.param_groups:
            for q in group["params"]:
                if q.grad is not None and self.name == "Adagrad" and not self.b.state.get(q):
                    start = group["initial_accumulator_value"]
                    fill = complex(start, start) if q.is_complex() else start
                    self.b.state[q] = {"step": torch.tensor(0.0), "sum": torch.full_like(q, fill).detach()}
        grads = [q.grad for q in self.theirs]
        for q in self.theirs:
            if q.grad is not None:
                q.grad = q.grad.clone()
        if clip is not None:
            with_gradients = [q for q in self.theirs if q.grad is not None]
            if self.engine == "cuda":  # by our norm, which is compared by itself: it may be off by more than the rest
                norm = self.a.grad_norm.double()
                torch.nn.utils.clip_grads_with_norm_(with_gradients, clip, norm, foreach=False)
            else:
                torch.nn.utils.clip_grad_norm_(with_gradients, clip, foreach=False)
        for i, q in enumerate(self.theirs):
            if q.grad is not None:
                self.largest[i] = max(self.largest[i], biggest(q.grad) + 0.1 * biggest(q))
        self.b.step()
        for q, g in zip(self.theirs, grads, strict=True):
            q.grad = g

    @contextmanager
    def untouched(self, stepped):
        """Nothing but what is stepped changes in the block: no other bytes of any buffer, and no gradient."""
        writable = [self.ours[i] for i in stepped]
        writable += [state[key] for p in writable if (state := self.a.state.get(p)) for key in tensors(state)]
        homes = defaultdict(list)
        for t in writable:
            homes[home(t)].append(t)
        buffers = [(b, b.outside(homes), b.bytes()) for b in self.buffers]
        gradients = [(p.grad, None if p.grad is None else bits(p.grad)) for p in self.ours]
        others = [i for i in range(len(self.ours)) if i not in set(stepped)]
        before = {i: self.all_of(i) for i in others}
        yield
        for buffer, outside, old in buffers:
            assert torch.equal(buffer.bytes()[outside], old[outside]), "memory between tensors was written"
        for p, (g, old) in zip(self.ours, gradients, strict=True):
            assert p.grad is g and (g is None or torch.equal(bits(g), old)), "a gradient changed"
        for t, old in self.kept:
            assert torch.equal(bits(t), old), "a tensor was written that had been replaced"
        for i in others:
            now = self.all_of(i)
            assert now.keys() == before[i].keys(), f"parameter {i} was not stepped, but its states are others"
            for key, value in now.items():
                assert torch.equal(value, before[i][key]), f"parameter {i} was not stepped, but its {key} changed"

    @contextmanager
    def untouched_by_error(self):
        before = [self.all_of(i) for i in range(len(self.ours))]
        try:
            yield
        except Exception as error:
            for i, old in enumerate(before):
                now = self.all_of(i)
                same = now.keys() == old.keys() and all(torch.equal(now[k], old[k]) for k in now)
                assert same, f"an error ({error}) changed parameter {i} or its states"
            raise

    def all_of(self, i):
        """A parameter and its state, as bytes."""
        state = self.a.state.get(self.ours[i], {})
        found = {key: bits(state[key]) for key in tensors(state)}
        found |= {key: torch.tensor(float(state[key])) for key in SCALARS if key in state}
        return {"param": bits(self.ours[i]), **found}

    def resolve(self):
        """Make lazily conjugated and negated tensors plain; whether there were any."""
        found = False
        for p in self.ours:
            state = self.a.state.get(p, {})
            for t in [p, *(state[key] for key in tensors(state))]:
                if t.is_conj() or t.is_neg():
                    t.data, found = t.data.resolve_conj().resolve_neg(), True
        return found

    # ------------------------------------------------------------------- comparison

    def compare(self, i):
        """A parameter that was stepped, and its state, are theirs; then theirs become ours where ours were rounded."""
        p, q = self.ours[i], self.theirs[i]
        ours, theirs = self.a.state.get(p, {}), self.b.state.get(q, {})
        assert set(tensors(ours)) == set(tensors(theirs)), (i, list(ours), list(theirs))
        group = next(g for g in self.b.param_groups if any(r is q for r in g["params"]))
        error = (
            FLOAT_SCALARS if self.name in ("NAdam", "ASGD") else ERRORS[p.dtype if p.dtype in WIDE else torch.float32]
        )
        reach = max([self.largest[i], *(biggest(theirs[key]) for key in tensors(theirs) if key not in SQUARES)])
        for key in tensors(ours):
            scale = self.largest[i] ** 2 if key in SQUARES else reach
            self.close(ours[key], theirs[key], error, error * scale, f"{key} of parameter {i}")
        self.close(p, q, error, error * (1 + group["lr"] * reach), f"parameter {i}")
        for key in SCALARS:
            if key in theirs:
                now, expected = float(ours[key]), float(theirs[key])
                same = math.isclose(now, expected, rel_tol=FLOAT_SCALARS if key != "step" else 0, abs_tol=1e-30)
                assert same, (f"{key} of parameter {i}", now, expected)
        for key in SCALARS[1:]:
            if key in theirs:
                theirs[key] = torch.tensor(float(ours[key]), dtype=torch.float64)
        if any(t.dtype not in WIDE for t in (p, *(ours[key] for key in tensors(ours)))):
            self.largest[i] = 0.0
            q.data.copy_(wide(p))
            for key in tensors(ours):
                theirs[key].copy_(wide(ours[key]))

    def close(self, got, expected, error, absolute, label):
        """Equal but for rounding, and not finite where the other is not."""
        dtype = got.dtype
        if dtype == expected.dtype and torch.allclose(got, expected, rtol=error, atol=absolute):
            return  # the rest takes its time
        got, expected = (torch.view_as_real(t) if t.is_complex() else t for t in (wide(got), wide(expected)))
        if dtype in ERRORS:
            error = max(error, ERRORS[dtype] if dtype not in WIDE else 0)
        limit, size, finite = torch.finfo(dtype), expected.abs(), expected.isfinite()
        absolute += min(error, 1e-5) * biggest(expected) + limit.smallest_normal * limit.eps
        near = (got - expected).abs() <= error * size + absolute
        overflowed = finite & (size > 0.99 * limit.max)
        same = torch.where(finite, near, ~got.isfinite()) | overflowed
        assert same.all(), (label, dtype, got[~same], expected[~same])


def biggest(t):
    return float(t.detach().abs().nan_to_num(0, 0, 0).max()) if t.numel() else 0.0
