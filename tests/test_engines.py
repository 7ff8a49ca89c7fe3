"""Which engine steps what, and what is said of it."""

import pytest
import torch

import fusedopt
from fusedopt import engines


def test_an_optimizer_says_what_steps(engine):
    ps = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5, 7)]
    optimizer = fusedopt.AdamW([{"params": ps[:2]}, {"params": ps[2:]}], engine=engine)
    assert optimizer.engines == ()
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (stepping,) = optimizer.engines
    assert stepping == (engine, torch.device("cpu"), 3) and stepping.parameters == 3 and stepping.name == engine


def test_engines_that_share_an_optimizer():
    plain, sparse = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fusedopt.SGD([plain, sparse], lr=0.1)
    plain.grad, sparse.grad = torch.ones(3), torch.ones(3).to_sparse()
    optimizer.step()
    assert {(stepping.name == "eager", stepping.parameters) for stepping in optimizer.engines} == {
        (True, 1),
        (False, 1),
    }


def test_what_is_wanted_in_plain_torch_is_not_warned_of(monkeypatch):
    """Nor what no engine takes."""
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(engines.ENGINES[name], "available", lambda: "it was not built")
    monkeypatch.setattr(engines, "_warned", False)

    def step(is_sparse=False, **how):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3).to_sparse() if is_sparse else torch.ones(3)
        fusedopt.SGD([p], lr=0.5, **how).step()
        assert p.tolist() == [0.5] * 3

    step(engine="eager")
    step(is_sparse=True)
    with pytest.warns(RuntimeWarning, match="'cpu' in plain torch.*engine 'cpu' is not available: it was not built"):
        step()
    step()
