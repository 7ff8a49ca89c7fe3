"""The programs of docs/clients and of examples run as they stand."""

import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import clients_path

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "clients").glob("*.md"))
NEEDS = {"nemo": "yaml", "torch_compile": "torch"}  # what a page's program imports, where that is not the page's name
EXAMPLES = {  # what each imports, how much of it is enough here, and what it says in the end
    "transformers_trainer": ("transformers", 10, "eval_loss"),
    "lightning_module": ("lightning", 10, "val_loss"),
    "timm_training": ("timm", 10, "loss of the averaged weights"),
}


def programs(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def after_import_of(module):
    """In the worker that has imported it anyway."""
    return pytest.mark.xdist_group({"accelerate": "transformers"}.get(module, module))


def run(monkeypatch, capsys, folder, module, program, *arguments):
    """What a program prints."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'fusedopt[clients]'")
    for path in clients_path():
        monkeypatch.syspath_prepend(path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if module == "deepspeed":  # which begins a process group
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
        environment = {**os.environ, **alone}
        return subprocess.run(
            [sys.executable, str(program)], env=environment, check=True, stdout=subprocess.PIPE
        ).stdout
    with torch.random.fork_rng():
        runpy.run_path(str(program), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=after_import_of(NEEDS.get(page.stem, page.stem)), id=page.stem)
        for page in PAGES
        if programs(page)
    ],
)
def test_pages_run(tmp_path, monkeypatch, capsys, page):
    program = tmp_path / "program.py"
    program.write_text("\n".join(programs(page)))
    run(monkeypatch, capsys, tmp_path, NEEDS.get(page.stem, page.stem), program)


def test_every_page_has_a_program_and_is_listed():
    listed = (ROOT / "docs" / "clients" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or (programs(page) and f"({page.name})" in listed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=after_import_of(module)) for name, (module, *_) in EXAMPLES.items()]
)
def test_examples_run(tmp_path, monkeypatch, capsys, name):
    module, steps, said = EXAMPLES[name]
    program = ROOT / "examples" / f"{name}.py"
    assert said in run(monkeypatch, capsys, tmp_path, module, program, "--steps", str(steps))


def test_the_example_of_ranks_runs(tmp_path):
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = [str(ROOT / "examples" / "fsdp2.py"), "--steps", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *ranks, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and "resumed" in done.stdout, done.stdout + done.stderr
