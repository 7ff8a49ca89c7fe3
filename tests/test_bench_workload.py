"""Gradients of the benchmark: kept, new in every step, or off the bounds that wide accesses want."""

import pytest
import torch

from fusedopt.bench import suites, timing, workload
from fusedopt.bench.measure import Bench
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.workload import Tensors, Workload
from fusedopt.cli import main


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Flushing and drawing values take longest where tensors are this small."""
    monkeypatch.setattr(workload, "POOL", 2**12 + 1)
    monkeypatch.setattr(timing, "FLUSHED", {"cpu": 2**12, "cuda": 2**12})


def tensors(gradients, dtype="fp32"):
    return Tensors(Workload(suites.find("5x64"), CASES["AdamW"], gradients=gradients, dtype=dtype))


@pytest.mark.parametrize("cache, order", [("cold", "renew step"), ("warm", "step step step renew step")])
def test_what_is_new_is_made_right_before_the_step_that_is_timed(cache, order):
    done = []
    watch = timing.Stopwatch(torch.device("cpu"), cache, lambda: done.append("renew"))
    assert watch(lambda: done.append("step")) > 0
    assert " ".join(done) == order


def test_a_flush_ends_with_a_read(monkeypatch):
    """What the flush has written is not left for the step to write back."""
    done = []
    watch = timing.Stopwatch(torch.device("cpu"), "cold")
    for name in ("mul_", "sum"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, name=name: done.append((name, self.numel())))
    watch(lambda: done.append("step"))
    assert done == [("mul_", 2**10), ("sum", 2**10), "step"]


def test_new_gradients_are_other_tensors_of_the_same_values():
    made, kept = tensors("fresh"), tensors("kept")
    before = [p.grad for p in made.params]
    made.renew()
    assert all(p.grad is not g for p, g in zip(made.params, before, strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(made.params, kept.params, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_misaligned_gradients_begin_off_16_byte_bounds(dtype):
    made, kept = tensors("misaligned", dtype), tensors("kept", dtype)
    assert all(p.grad.data_ptr() % 16 and p.grad.is_contiguous() for p in made.params)
    assert all(p.data_ptr() % 16 == 0 for p in made.params)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(made.params, kept.params, strict=True))


@pytest.mark.parametrize("gradients", ["kept", "fresh"])
def test_every_timed_step_of_a_row_has_them(gradients, monkeypatch):
    renewed, renew = [], Tensors.renew

    def watched(self):
        before = [p.grad for p in self.params]
        renew(self)
        renewed.append(all(p.grad is not g for p, g in zip(self.params, before, strict=True)))

    monkeypatch.setattr(Tensors, "renew", watched)
    case = Workload(suites.find("3x100"), CASES["AdamW"], gradients=gradients)
    rows = Bench(("eager",), ("torch-fused",), repeats=2).run(case)
    assert {row.gradients for row in rows} == {gradients} and len(rows) == 3
    assert len(renewed) >= sum(row.rounds for row in rows) and set(renewed) == {gradients == "fresh"}


def test_gradients_are_of_one_kind(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--fresh-grads", "--misaligned-grads"])
    assert "not allowed with" in capsys.readouterr().err
