"""`make gpu`: commands that fail, hang or cannot run, and what is left of them."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from conftest import GPU

ROOT = Path(__file__).parents[1]
NONE = GPU | {"device": "", "arch": ""}


@pytest.fixture
def run(visit, monkeypatch, tmp_path):
    """Run a visit of stages by the names of their parts, and return its exit status and what is in summary.json."""

    def run(stages, *arguments):
        made = [visit.Part(name, stages.get(name, []), 50) for name in visit.PARTS]
        monkeypatch.setattr(visit, "parts", lambda out, gpu: made)
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "out"), *arguments])
        return visit.main(), json.loads((tmp_path / "out" / "summary.json").read_text())

    return run


def program(text):
    return [sys.executable, "-c", text]


def packed(out):
    """What is in the archive, by path."""
    with tarfile.open(out / "results.tgz") as archive:
        members = [member for member in archive if member.isfile()]
        return {member.name: archive.extractfile(member).read().decode() for member in members}


def test_one_command_of_a_visit_does_not_stop_the_others(visit, run, tmp_path, capsys):
    late = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what there is')"
    deaf = "import signal, time\nsignal.signal(2, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    said = f"print('{visit.SUMMARY}'); print('the fastest')"
    visit.GRACE_SECONDS = 1
    stages = {
        "build": [[visit.Command("build", program("raise SystemExit('no compiler')"), 60)]],
        "smoke": [[visit.Command("smoke-absent", ["/no/such/program"], 60)]],
        "tune": [[visit.Command("tune", ["/no/such/program"], 60, optional=True)]],
        "test": [
            [
                visit.Command("test-late", program(late), 1),
                visit.Command("test-deaf", program(deaf), 1),
                visit.Command("test-fault", program("import os; os.abort()"), 60),
            ],
        ],
        "bench": [[visit.Command("bench", program(said), 60)]],
        "ncu": [
            [visit.Command("ncu-denied", program("print('ERR_NVGPUCTRPERM'); print('n'); exit(1)"), 60, optional=True)],
            [visit.Command("ncu-staged", [sys.executable, "-m", "fusedopt", "bench", "--help"], 60)],
        ],
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").write_text("of the visit before")
    start = time.monotonic()
    status, summary = run(stages)
    assert status == 1 and time.monotonic() - start < 30
    found = {
        name: (entry["status"], entry["detail"], entry["last_line"]) for name, entry in summary["commands"].items()
    }
    assert found["build"] == ("failed", "exit status 1", "no compiler")
    assert found["smoke-absent"][:2] == ("failed", "/no/such/program: No such file or directory")
    assert found["tune"][0] == "skipped" and "/no/such/program" in found["tune"][1]
    assert found["test-late"] == ("stopped", "after 1 s", "what there is")
    assert found["test-deaf"] == ("stopped", "after 1 s", "deaf")
    assert found["test-fault"][:2] == ("failed", "exit status -6")
    assert found["bench"] == ("ok", "", "the fastest")
    assert found["ncu-denied"][0] == "skipped" and "no permission" in found["ncu-denied"][2]
    assert found["ncu-staged"][0] == "ok", (tmp_path / "out" / "ncu-staged.log").read_text()
    assert not (tmp_path / "out" / "bench.json").exists()

    page = (tmp_path / "out" / "SUMMARY.md").read_text()
    assert capsys.readouterr().out.endswith(page) and "the fastest" in page
    assert re.search(r"\| test-late \| [1-9][\d.]* \| stopped: after 1 s \| what there is \|", page), page
    assert all(fact in page for fact in ("NVIDIA H200", "torch 2.13", summary["commit"]))
    files = packed(tmp_path / "out")
    assert files["results/SUMMARY.md"] == page and files["results/test-late.log"] == "what there is\n"
    assert {f"results/{name}.log" for name in found} <= files.keys()
    wrapper = subprocess.run([tmp_path / "out" / "fusedopt", "bench", "--help"], capture_output=True, text=True)
    assert wrapper.returncode == 0 and "--suite" in wrapper.stdout


def test_a_deaf_process_is_killed_with_what_it_started(visit, run, tmp_path):
    visit.GRACE_SECONDS = 1
    deaf = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # deaf too
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""
    command = visit.Command("test-deaf", [*program(deaf), str(tmp_path / "ids")], 3)
    status, summary = run({"test": [[command, visit.Command("test-quick", program("print(1)"), 60)]]})
    assert status == 1 and summary["commands"]["test-deaf"]["status"] == "stopped"
    assert summary["commands"]["test-deaf"]["seconds"] < 15
    for process in map(int, (tmp_path / "ids").read_text().split()):
        state = Path(f"/proc/{process}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z", process
    assert {"results/test-deaf.log", "results/test-quick.log", "results/SUMMARY.md"} <= packed(tmp_path / "out").keys()


def test_archive_stays_small(visit, run, monkeypatch, tmp_path):
    monkeypatch.setattr(visit, "LOG_BYTES", 2**14)
    monkeypatch.setattr(visit, "FILE_BYTES", 2**16)
    monkeypatch.setattr(visit, "ALL_BYTES", 2**17)
    write = """
import os, sys
for name, size in (("large", 2**16 + 1), ("first", 2**16), ("second", 2**16 - 1)):
    with open(f"{sys.argv[1]}/ncu-{name}.rep", "wb") as file:
        file.write(os.urandom(size))
print("begin", "x" * 2**16, "end")
"""
    run({"ncu": [[visit.Command("ncu", [*program(write), str(tmp_path / "out")], 60)]]})
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        names, log = archive.getnames(), archive.extractfile("results/ncu.log").read()
    assert "results/ncu-second.rep" in names and not {"results/ncu-large.rep", "results/ncu-first.rep"} & {*names}
    assert log.startswith(b"begin x") and log.endswith(b"x end\n") and b"[...]" in log and len(log) < 2**14 + 10
    assert (tmp_path / "out" / "results.tgz").stat().st_size < 2**17
    page = (tmp_path / "out" / "SUMMARY.md").read_text()
    assert "Too large for it: ncu-first.rep (0 MiB), ncu-large.rep (0 MiB)." in page
    monkeypatch.setattr(visit, "ALL_BYTES", 2**20)
    assert visit.fitting(tmp_path / "out")[1] == ["ncu-large.rep (0 MiB)"]


def test_what_is_optional_does_not_fail_a_visit(visit, run):
    stages = {"ncu": [[visit.Command("ncu", program("exit(1)"), 60, optional=True)]]}
    status, summary = run(stages)
    assert status == 0 and summary["commands"]["ncu"]["detail"] == "failed exit status 1"


def test_commands_of_a_stage_run_at_the_same_time_and_stages_do_not(visit, run, tmp_path):
    wait = """
import pathlib, sys, time
own, other = (pathlib.Path(sys.argv[1], name) for name in sys.argv[2:])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""
    names = ("a", "b")
    pair = [visit.Command(f"test-{n}", [*program(wait), str(tmp_path), n, m], 20) for n, m in (names, names[::-1])]
    after = visit.Command(
        "test-after", program(f"import pathlib; assert pathlib.Path({str(tmp_path)!r}, 'b').exists()"), 20
    )
    status, summary = run({"test": [pair, [after]]})
    assert status == 0, summary


def test_archive_is_whole_after_each_command(visit, run, monkeypatch, tmp_path):
    """Also while a command writes, and it has what the stopped one wrote."""
    seen, pack = [], visit.pack
    monkeypatch.setattr(visit, "pack", lambda out: (pack(out), seen.append(packed(out))))
    endless = "import sys\nfor i in range(10**9): print(i, flush=True)"
    stages = {
        "test": [
            [visit.Command("test-endless", program(endless), 2), visit.Command("test-quick", program("print(1)"), 60)],
            [visit.Command("test-last", program("print(2)"), 60)],
        ]
    }
    run(stages)
    assert len(seen) == 3
    assert seen[0]["results/test-quick.log"] == "1\n" and "results/test-last.log" not in seen[0]
    assert (
        seen[1]["results/test-endless.log"].startswith("0\n1\n2\n") and "test-endless" in seen[1]["results/SUMMARY.md"]
    )
    assert seen[2]["results/test-last.log"] == "2\n"
    assert not list((tmp_path / "out").glob("*.part"))


def test_archive_is_replaced_at_once(visit, monkeypatch, tmp_path):
    """Whoever ends the visit in the middle leaves the archive of before."""
    (tmp_path / "a.log").write_text("first")
    visit.pack(tmp_path)
    (tmp_path / "b.log").write_text("second")

    def ends(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(visit.tarfile.TarFile, "addfile", ends)
    with pytest.raises(KeyboardInterrupt):
        visit.pack(tmp_path)
    assert packed(tmp_path) == {"results/a.log": "first"}


def test_parts_are_picked(visit, run, capsys):
    stages = {name: [[visit.Command(name, program(""), 60)]] for name in visit.PARTS}
    assert [*run(stages)[1]["commands"]] == ["build", "smoke", "tune", "test", "bench", "ncu"]
    some = run(stages, "--part", "gate,sanitize", "--part", "smoke")[1]
    assert [*some["commands"]] == ["build", "smoke", "sanitize", "gate"]
    assert [*run(stages, "--part", "build")[1]["commands"]] == ["build"]
    with pytest.raises(SystemExit):
        run(stages, "--part", "tests")
    assert "tests: there are build, smoke" in capsys.readouterr().err


def test_time_that_is_left_goes_to_later_parts_and_later_stages_keep_theirs(visit, run, monkeypatch):
    limits = {}

    def wait(self, command, log, seconds):
        limits[command.name] = seconds
        return "ok", ""

    monkeypatch.setattr(visit.Visit, "wait", wait)
    monkeypatch.setattr(visit, "STAGE_SECONDS", 20)
    monkeypatch.setattr(visit, "ALL_SECONDS", 120)
    stages = {"build": [[visit.Command("build", [], 999)]]}
    stages["gate"] = [[visit.Command("gate-first", [], 999)], [visit.Command("gate-last", [], 999)]]
    run(stages, "--part", "gate")
    # 115 s without the grace; each part has 50.
    assert 60 < limits["build"] <= 65 and 90 < limits["gate-first"] <= 95 and 110 < limits["gate-last"] <= 115
    monkeypatch.setattr(visit, "ALL_SECONDS", 5)
    assert {entry["detail"] for entry in run(stages)[1]["commands"].values()} == {"no time was left"}


def test_limits_of_parts(visit, tmp_path):
    for gpu in (True, False):
        made = {part.name: part for part in visit.parts(tmp_path, gpu)}
        assert tuple(made) == visit.PARTS
        limit = visit.ALL_SECONDS if gpu else visit.IDLE_SECONDS
        assert sum(made[name].seconds for name in visit.PARTS[: visit.DEFAULT]) <= limit < (540 if gpu else 301)
        assert sum(made[name].seconds for name in ("build", "sanitize", "gate")) <= limit
        for part in made.values():
            names = [command.name for commands in part.stages for command in commands]
            assert names and all(re.fullmatch(f"{part.name}(-.+)?", name) for name in names)
            assert len(set(names)) == len(names) and all(command.seconds > 0 for s in part.stages for command in s)
            assert part.seconds > visit.STAGE_SECONDS * (len(part.stages) - 1) or not gpu


def test_what_needs_a_gpu_is_skipped_without_one_and_says_what_it_would_do(visit, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(visit, "machine", lambda: NONE)
    monkeypatch.setattr(
        visit.Visit, "wait", lambda self, command, log, seconds: (started.append(command), ("ok", ""))[1]
    )
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "out"), "--part", ",".join(visit.PARTS)])
    assert visit.main() == 0
    commands = {command.name: command for command in started}
    assert commands.keys() == {*"build build-cuda smoke-info smoke-cpu tune test-collect bench bench-report".split()}
    assert "--dry-run" in commands["tune"].command and "cpu" in commands["bench"].command
    page = (tmp_path / "out" / "SUMMARY.md").read_text()
    for name, does in (
        ("smoke-cuda", "3 steps of AdamW by cuda"),
        ("smoke-driver", "nvidia-smi"),
        ("test-triton-graphs", "pytest -k 'triton and .graph"),
        ("bench-gpt2-clip-1", "bench --suite gpt2 --clip 1"),
        ("ncu-gpt2", "ncu on AdamW"),
        ("sanitize-racecheck", "--tool racecheck"),
        ("gate-cuda-bfloat16", "pytest"),
    ):
        assert re.search(rf"\| {name} \| 0.0 \| skipped: {visit.NO_GPU} \| would run: .*{does}", page), (name, page)
    with_gpu = {c.name: c for part in visit.parts(tmp_path, True) for commands in part.stages for c in commands}
    assert "--dry-run" not in with_gpu["tune"].command and "cpu" not in with_gpu["bench"].command
    assert not any(c.skip for c in with_gpu.values() if not c.name.startswith(("ncu", "sanitize")))


def test_programs_of_cuda_that_are_not_there(visit, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    skipped = {c.skip for part in visit.parts(tmp_path, True) for commands in part.stages for c in commands if c.skip}
    assert skipped == {f"no {name} in PATH or /usr/local/cuda/bin" for name in ("ncu", "compute-sanitizer")}


def test_each_gpu_test_is_in_exactly_one_process(visit, tmp_path):
    names = []
    for file in re.findall(r"tests/\S+", visit.lists.TESTS):
        tree = ast.parse((ROOT / file).read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert functions
        for function in functions:
            arguments = {argument.arg for argument in function.args.args}
            dtypes = visit.lists.DTYPES if "dtype" in arguments else ("",)
            engines = visit.lists.ENGINES if arguments & {"engine", "device"} else ("",)
            names += [f"{file}::{function.name}[{engine}-{dtype}]" for engine in engines for dtype in dtypes]
    made = [part for part in visit.parts(tmp_path, True) if part.name in ("test", "gate")]
    selections = [c.command[c.command.index("-k") + 1] for part in made for commands in part.stages for c in commands]
    assert len(names) > 60

    def is_in(name, selection):
        return eval(re.sub(r"\w+", lambda w: w[0] if w[0] in ("and", "or", "not") else str(w[0] in name), selection))

    for name in names:
        assert sum(is_in(name, selection) for selection in selections) == 1, name
    for selection in selections:
        assert any(is_in(name, selection) for name in names), selection
    assert sum(is_in(f"test_engines_agree[cuda-{name}]", visit.lists.SANITIZED) for name in ("AdamW", "Lion")) == 1


def test_smoke_compares_with_eager(visit):
    ran = subprocess.run([*program(visit.lists.STEPS), "cpu", "10x1000", "1"], capture_output=True, text=True)
    assert ran.returncode == 0 and "cpu on cpu: at most" in ran.stdout, ran.stderr


def test_commit_without_git(visit, run, monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        monkeypatch.delenv("FUSEDOPT_COMMIT", raising=False)
        assert re.fullmatch(r"[0-9a-f]{40}\+?", visit.commit())
    (tmp_path / "sources" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(visit, "ROOT", tmp_path / "sources")
    monkeypatch.setattr(visit, "surroundings", lambda out, built: {})
    source, found = tmp_path / "sources" / "csrc" / "a.cu", []
    for text in ("1", "2"):
        source.write_text(text)
        show = visit.Command("build", program("import os; print(os.environ['FUSEDOPT_COMMIT'])"), 60)
        found.append(run({"build": [[show]]}, "--part", "build")[1])
        assert found[-1]["commit"].startswith("sources-") and len(found[-1]["commit"]) > 16
        assert found[-1]["commands"]["build"]["last_line"] == found[-1]["commit"]
        assert "No commit known, hash over the sources" in (tmp_path / "out" / "SUMMARY.md").read_text()
    assert found[0]["commit"] != found[1]["commit"]
    monkeypatch.setenv("FUSEDOPT_COMMIT", "abc")
    assert run({"build": [[show]]})[1]["commit"] == "abc"


def test_tables_that_matter(visit, tmp_path):
    log = tmp_path / "tune.log"
    assert visit.table(log) == ""
    log.write_text(
        "Compiled\n\nFirst\n────\na\n\nMicroseconds\nvariant  gpt2\n──────\nwaves=2  812\n\nWrote tune.json\n"
    )
    assert visit.table(log) == "Microseconds\nvariant  gpt2\n──────\nwaves=2  812"
    log.write_text(f"{visit.SUMMARY}\nof before\n\n{visit.SUMMARY}\nAdamW 1\n\nWrote\n")
    assert visit.table(log).startswith(f"{visit.SUMMARY}\nAdamW 1")


def test_interrupt_ends_what_runs_and_leaves_a_page(visit, run, tmp_path, capsys):
    sleeps = visit.Command("build", program("import time; print('began', flush=True); time.sleep(60)"), 60)
    threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    quick = visit.Command("build-quick", program("print(1)"), 60)
    start = time.monotonic()
    status, _ = run({"build": [[quick, sleeps]]}, "--part", "build")
    assert status == 130 and time.monotonic() - start < 20
    assert "build-quick" in capsys.readouterr().out and packed(tmp_path / "out")["results/build-quick.log"] == "1\n"
