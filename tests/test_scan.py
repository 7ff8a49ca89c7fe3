"""Everything that a scan must notice, with the scan in Python: where no C++ compiler built the other one."""

import pytest
import torch
from conftest import AVAILABLE
from test_errors import *  # noqa: F403
from test_layouts import *  # noqa: F403
from test_moved import *  # noqa: F403

import fusedopt
from fusedopt.scan import Scan


@pytest.fixture(params=[name for name in AVAILABLE if name in ("cuda", "triton")][:1])  # their plans are the same
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
