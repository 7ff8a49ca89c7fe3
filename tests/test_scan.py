"""Everything that a scan must notice, with the scan in Python: where no C++ compiler built the other one."""

import pytest
import torch
from conftest import AVAILABLE
from test_errors import *  # noqa: F403
from test_layouts import *  # noqa: F403
from test_moved import *  # noqa: F403

import fusedopt
from fusedopt.scan import Scan

# Their plans are the same: Triton's interpreter, where it is not the only one, is for the night.
DEVICES = [name for name in ("cuda", "triton") if name in AVAILABLE]


@pytest.fixture(params=[*DEVICES[:1], *(pytest.param(name, marks=pytest.mark.nightly) for name in DEVICES[1:])])
def engine(request, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_HOST", "python")
    return request.param


def test_the_scan_is_in_python(engine):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedopt.SGD([p], engine=engine)
    optimizer.step()
    (plan,) = optimizer._plans
    assert isinstance(plan._scan, Scan)
