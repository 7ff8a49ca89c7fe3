"""timm makes our optimizers by name, with its own groups."""

import subprocess
import sys

import pytest
import torch
from helpers import ALL, EVERY, clients_path, close

import fusedopt
from fusedopt.integrations.timm import register

pytestmark = pytest.mark.xdist_group("timm")


@pytest.fixture(scope="module")
def timm_optim():
    """timm.optim, with something in torchvision's place where that is not installed."""
    sys.path[:0] = [path for path in clients_path() if path not in sys.path]
    return pytest.importorskip("timm.optim", reason="timm is not installed: pip install --no-deps timm")


def a_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 2)
    )


def test_every_class_has_a_name_and_is_made_by_it(timm_optim):
    names = register()
    assert register() == names and len(names) == len(EVERY)
    assert set(names) <= set(timm_optim.list_optimizers())
    for name in names:
        optimizer = timm_optim.create_optimizer_v2(a_model(), name, lr=0.01)
        assert name == f"fo{type(optimizer).__name__.lower()}" and isinstance(optimizer, fusedopt.FusedOptimizer)
        if name[2:] in map(str.lower, ALL):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()


def test_momentum_and_other_options_arrive(timm_optim):
    register()
    optimizer = timm_optim.create_optimizer_v2(
        a_model(), "fosgd", lr=0.01, max_grad_norm=2.0, nesterov=True, foreach=False
    )
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"] and optimizer.max_grad_norm == 2.0
    optimizer = timm_optim.create_optimizer_v2(a_model(), "foadamw", eps=1e-5, betas=(0.8, 0.9))
    assert optimizer.defaults["eps"] == 1e-5 and optimizer.defaults["betas"] == (0.8, 0.9)
    optimizer = timm_optim.create_optimizer_v2(a_model(), "lookahead_foadamw")
    assert type(optimizer).__name__ == "Lookahead"
    with pytest.raises(ValueError, match="Rprop has none"):
        timm_optim.create_optimizer_v2(a_model().parameters(), "forprop", weight_decay=0.1)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "layer_decay": 0.5}], ids=str)
def test_losses_are_those_of_timms_adamw(timm_optim, options):
    register()
    models = a_model(), a_model()
    ours, theirs = (
        timm_optim.create_optimizer_v2(model, name, lr=0.01, **options)
        for model, name in zip(models, ("foadamw", "adamw"), strict=True)
    )
    assert [set(g) >= set(h) for g, h in zip(ours.param_groups, theirs.param_groups, strict=True)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(8, 3, 6, 6, generator=generator)
        losses = []
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        close(*losses, 1e-5)


def test_nothing_is_imported_until_it_is_asked_for():
    program = (
        "import sys, fusedopt.integrations.timm, fusedopt.integrations.transformers, fusedopt.integrations.lightning"
    )
    clients = ("timm", "transformers", "accelerate", "lightning")
    subprocess.run([sys.executable, "-c", f"{program}; assert not {{*{clients}}} & {{*sys.modules}}"], check=True)
