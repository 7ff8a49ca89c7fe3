import pytest
import torch

from fusedopt import engines

AVAILABLE = [name for name, engine in engines.ENGINES.items() if engine.available() is None]


@pytest.fixture(params=AVAILABLE)
def engine(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_report_header():
    reasons = {name: module.available() for name, module in engines.ENGINES.items()}
    return [f"engine {name}: {reason or 'available'}" for name, reason in reasons.items()]
