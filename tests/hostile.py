"""What tests of hostile tensors, containers and moments share: the result is torch's, or an error names the tensor."""

import pytest
from conftest import AVAILABLE
from helpers import close, pair, same_gradients

from fusedopt import host

FAST = [name for name in AVAILABLE if name != "eager"]
# The scan in Python is one for all devices: Triton's interpreter, which is slow, only where there is no other.
OTHERWISE = [name for name in FAST if name != "triton" or "cuda" not in AVAILABLE]


@pytest.fixture(
    params=[*AVAILABLE, *(f"{name}, {'DLPack' if name == 'cpu' else 'scan in Python'}" for name in OTHERWISE)]
)
def engine(request, monkeypatch):
    """Every engine, and each of them with another way to read tensors."""
    name, _, reading = request.param.partition(", ")
    if reading == "DLPack":
        host.load().forget_abi()
    elif reading:
        monkeypatch.setenv("FUSEDOPT_HOST", "python")
    yield name
    if reading == "DLPack":
        assert host.bind_abi(host.load())


def stepped(engine, shapes=((5,), (4, 3), (6,)), steps=2, name="AdamW", **options):
    """Ours and torch's after some steps, with gradients for the next."""
    ours, a, theirs, b = pair(shapes, name, engine=engine, **options)
    for _ in range(steps):
        same_gradients(ours, theirs)
        a.step(), b.step()
    same_gradients(ours, theirs)
    return ours, a, theirs, b


def assert_equal(ours, a, theirs, b):
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach().resolve_conj().resolve_neg(), q.detach().resolve_conj().resolve_neg(), 1e-5)
        for key, value in b.state[q].items():
            close(a.state[p][key].resolve_conj().resolve_neg(), value.resolve_conj().resolve_neg(), 1e-5)
