"""Whole processes: what the first use finds out, a forked child, a DataLoader's worker."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import AVAILABLE

import fusedopt
from fusedopt import host

FIRST_USE = {
    "fake tensors": "from torch._subclasses import FakeTensorMode\nwith FakeTensorMode():\n    use()",
    "vmap": "torch.vmap(lambda x: (use(), x)[1])(torch.ones(3))",
    "default device": "torch.set_default_device('meta')\nuse()\ntorch.set_default_device('cpu')",
    "inference": "with torch.inference_mode():\n    use()",
}


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
@pytest.mark.parametrize("mode", FIRST_USE)
def test_first_use_under_a_mode(mode):
    program = (
        "import torch, fusedopt\nfrom fusedopt.engines import cpu\nfrom fusedopt import host\n"
        "def use():\n    assert cpu.available() is None, cpu.available()\n"
        f"{FIRST_USE[mode]}\n"
        "p = torch.nn.Parameter(torch.ones(3))\np.grad = torch.ones(3)\n"
        "fusedopt.AdamW([p], engine='cpu').step()\n"
        "print(host.reading_path())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "torch's C ABI"), run.stderr


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_failure_at_first_use_is_not_remembered(monkeypatch):
    from fusedopt.engines import cpu

    monkeypatch.setattr(host, "_path", None)
    cpu.load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(host, "_bind", lambda extension: 1 / 0)
        assert "division" in (cpu.available() or "")
    assert cpu.available() is None


FORKED = """
import os, sys, torch, fusedopt
torch.set_num_threads(2)
ps = [torch.nn.Parameter(torch.ones(n)) for n in (300_000, 300_000, *[3] * 600)]
for p in ps:
    p.grad = torch.ones_like(p)
optimizer = fusedopt.AdamW(ps, engine="cpu", max_grad_norm=1.0)
optimizer.step()
p = torch.nn.Parameter(torch.ones(300_000))
p.grad = torch.ones(300_000)
other = fusedopt.AdamW([p], engine=sys.argv[1])
child = os.fork()
if not child:
    optimizer.step()
    other.step()
    assert torch.get_num_threads() == 2
    os._exit(0 if optimizer.state[ps[0]]["step"] == 2 and other.state[p]["step"] == 1 else 3)
status = os.waitpid(child, 0)[1]
optimizer.step()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif("cpu" not in AVAILABLE or not hasattr(os, "fork"), reason="no CPU engine, or no fork")
@pytest.mark.parametrize("other", ["cpu", "eager"])
def test_step_in_a_forked_child(other):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, other], check=True, timeout=60)


class Steps(torch.utils.data.Dataset):
    """Items that are what a step does to a parameter."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        p = torch.nn.Parameter(torch.zeros(100_000))
        p.grad = torch.ones(100_000)
        fusedopt.SGD([p], lr=float(i)).step()
        return p.detach()[:3]


def test_step_in_a_data_loaders_worker():
    Steps()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(Steps(), num_workers=1, timeout=60)
        assert [float(item[0, 0]) for item in loader] == [0.0, -1.0, -2.0, -3.0]
