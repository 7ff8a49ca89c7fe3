"""The programs of README.md and docs run, and the site's pages that follow from the code say what is so."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import support
import torch
from helpers import EVERY

import fusedopt
from fusedopt.verification import gate, references

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "optimizers").glob("*.md")),
]


def programs(page):
    """Its blocks, but for rows of tables and the like, which are indented."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not block.startswith(" ")]


class Model(torch.nn.Module):
    """What the pages mean by one."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.BatchNorm1d(8))
        self.head = torch.nn.Linear(8, 1)
        self.process_group = None
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.relu(self.blocks(x)))


def names(page):
    """What the programs of a page take for granted."""
    dtype = torch.bfloat16 if page.stem == "storage" else torch.float32
    model = Model(dtype)
    batches = [(torch.randn(4, 8, dtype=dtype), torch.randn(4, 1, dtype=dtype)) for _ in range(2)]
    x, y = batches[0]
    optimizer = (fusedopt.KoalaM if page.stem == "koala" else fusedopt.AdamW)(model.parameters())
    return {
        **{"fusedopt": fusedopt, "torch": torch, "math": math, "model": model, "batches": batches, "x": x, "y": y},
        **{"device": torch.device("cpu"), "loss": torch.nn.MSELoss(), "p": model.head.weight, "optimizer": optimizer},
        **{"criterion": lambda output, target: (output - target).square().flatten(), "evaluate": lambda model: 0.0},
        **{
            "fully_shard": lambda module: module,
            "head": [*model.head.parameters()],
            "rest": [*model.blocks.parameters()],
        },
        **{"Tensor": torch.Tensor, "Memory": references.Memory, "_tick": references._tick},
    }


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)], ids=lambda page: page.stem)
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = names(page)
    theirs = torch.optim.AdamW(known["model"].parameters())
    known["loss"](known["model"](known["x"]), known["y"]).backward()
    theirs.step()
    torch.save(theirs.state_dict(), "torch_adamw.pt")
    for program in programs(page):
        if "predict" in program or "step_in_backward" in program:  # of another class, or without clipping
            known["optimizer"] = names(page)["optimizer"]
        exec(compile(program, str(page), "exec"), known)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = sys.modules["generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    out = tmp_path_factory.mktemp("site") / "docs"
    generate.main(out)
    return out


def test_every_public_name_has_a_place(site):
    api = (site / "reference" / "api.md").read_text()
    assert all(re.search(rf"\b{re.escape(name)}\b", api) for name in fusedopt.__all__)
    assert {path.stem for path in (site / "reference").glob("*.md")} >= {name.lower() for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_pages_of_optimizers_are_whole(site, name):
    page = (site / "reference" / f"{name.lower()}.md").read_text()
    for heading in ("equal to", "states", "engines", "## Arguments", "## Memory"):
        assert heading in page
    assert "| `lr` |" in page and "::" not in page and ":class:" not in page and "``" not in page.replace("```", "")


def test_bytes_are_those_of_the_storage_page(site):
    """AdamW's and Lion's, which stand there by hand."""
    stored = (site / "storage.md").read_text()
    said = re.findall(r"^\| (\w+) \| `?(\w+)`? \| (\S+) \| \**([\d.]+)\** \| \**([\d.]+)\** \|", stored, re.MULTILINE)
    assert len(said) == 10
    for name, at in (("adamw", 3), ("lion", 4)):
        page = (site / "reference" / f"{name}.md").read_text()
        rows = re.findall(r"^\| (\w+) \| `'?(\w+)'?` \| `'?(\w+)'?` \| ([\d.]+) \|", page, re.MULTILINE)
        assert len(rows) == 9
        for dtype, state_dtype, master, held in rows:
            (found,) = [row[at] for row in said if (row[0], row[1], row[2].strip('`"')) == (dtype, state_dtype, master)]
            assert abs(float(found) - float(held)) < 0.01


def test_the_support_page_tells_of_what_there_is(site):
    """Its file is of these optimizers, engines, types and versions, and all passed."""
    told = json.loads((ROOT / "docs" / "support.json").read_text())
    assert {*told["gate"]} == {*EVERY} and {*told["storage"]} == {*EVERY} - {"KoalaM", "KoalaV"}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in gate.DTYPES}
    for engines in told["gate"].values():
        assert all({*passed} == dtypes and all(passed.values()) for passed in engines.values())
        assert {*engines} == {"cpu", "cuda", "eager", "triton"}
    assert all(all(features.values()) for features in [*told["storage"].values(), *told["clients"].values()])
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {*told["clients"]} == {*told["versions"]} == {*support.CLIENTS}
    assert all(pinned[client] == version for client, version in told["versions"].items())
    page = (site / "reference" / "support.md").read_text()
    assert "| [AdamW](adamw.md) | bf16 fp16 fp32 fp64, *storages* | bf16 " in page and "failed" not in page
    assert re.search(r"^\| \[SWATS\]\(swats.md\) \| bf16 [^|]* \|  \| bf16 ", page, re.MULTILINE)


def test_every_page_is_in_the_navigation(site):
    """mkdocs says so too, when the site is built."""
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(site)) for path in site.rglob("*.md")}


def test_the_version_is_one():
    """In the package, the changelog and the citation."""
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
