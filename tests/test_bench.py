"""The benchmark: it times what it says it times, races nobody's wrong step, and its figures can be had again."""

import json
import shlex
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import small_bench
import torch

import fusedopt
from fusedopt.bench import arena, check, limits, measure, memory, peers, standard, suites, table, timing, workload
from fusedopt.bench.measure import Bench
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.peers import torch_optim
from fusedopt.bench.peers.peer import Peer
from fusedopt.bench.rows import Result
from fusedopt.bench.workload import Footprint, Tensors, Workload
from fusedopt.cli import main
from fusedopt.engines import cpu

needs_cpu_engine = pytest.mark.skipif(cpu.available() is not None, reason=f"needs the CPU engine: {cpu.available()}")
quick, ENGINE = small_bench.quick, small_bench.ENGINE


def tiny(case="AdamW", suite="3x100", **more):
    return Workload(suites.find(suite), CASES[case], **more)


def bench(*wanted, **more):
    return Bench((ENGINE,), wanted, repeats=2, **more)


def adamw(**options):
    """A peer that is torch's AdamW with some other options."""
    return Peer("other", "torch", partial(changed, options), CASES["AdamW"].options)


def changed(options, groups, **own):
    return torch.optim.AdamW([group | options for group in groups], **own)


def offer(monkeypatch, *offered):
    monkeypatch.setattr(peers, "offered", lambda case, device: list(offered))


@pytest.mark.parametrize(
    "name, tensors, numel, groups",
    [
        ("gpt2", 148, 124_439_808, 1),  # the counts that the models' authors give
        ("resnet50", 161, 25_557_032, 1),
        ("vit-b16", 152, 86_567_656, 1),
        ("llama3-8b:32", 32 * 9, 8_030_261_248 - 2 * 128_256 * 4096 - 4096, 1),  # without embeddings and last norm
        ("moe:24", 24 * 7 + 24 * 64, 24 * (50_331_648 + 3_145_728 + 2048 + 32_768), 24 * 32 + 1),
        ("10000x64", 10_000, 640_000, 1),
    ],
)
def test_suites_have_the_models_parameters(name, tensors, numel, groups):
    suite = suites.find(name)
    assert (len(suite.shapes), suite.numel, len(suite.groups)) == (tensors, numel, groups)
    assert suites.find(suite.name) == suite
    again = suite.regrouped(3)
    assert len(again.groups) == 3 and again.shapes == suite.shapes


@needs_cpu_engine
def test_every_row_can_be_measured_again_by_its_command(tmp_path, capsys):
    path, again = tmp_path / "a.json", tmp_path / "again.json"
    arguments = ["--suite", "40x300", "--groups", "4", "--optimizer", "AdamW", "--optimizer", "Lion", "--engine", "cpu"]
    arguments += ["--clip", "0.5", "--amp", "--dtype", "bf16", "--cache", "warm", "--repeats", "2", "--device", "cpu"]
    arguments += ["--fresh-grads"]
    arguments += [word for name in ("torch-fused", "torch-foreach", "lion-pytorch") for word in ("--peer", name)]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    document = json.loads(path.read_text())
    assert document.keys() == {"format", "commit", "versions", "machine", "device", "notes", "rows"}
    assert document["versions"].keys() >= {"fusedopt", "torch", "python", "lion-pytorch"}
    rows = Result.load(path).rows
    ours = ["fusedopt-cpu", "limit"]
    assert sorted(r.variant for r in rows) == sorted([*ours, *ours, "torch-fused", "torch-foreach", "lion-pytorch"])
    for row in rows:
        words = shlex.split(row.command)
        assert words[:2] == ["fusedopt", "bench"]
        assert main([*words[1:], "--json", str(again)]) == 0
        assert row.key in [r.key for r in Result.load(again).rows]


@needs_cpu_engine
def test_figures_of_a_row():
    rows = {row.variant: row for row in bench("torch-fused", "torch-for-loop").run(tiny(suite="30x64"))}
    ours, fused, loop, limit = (rows[name] for name in ("fusedopt-cpu", "torch-fused", "torch-for-loop", "limit"))
    assert ours.bytes == fused.bytes == 28 * 30 * 64
    assert limit.limit == 1 and ours.ratio is None and fused.same_update and ours.version == fusedopt.__version__
    for row in rows.values():
        assert 0 < row.q1 <= row.median <= row.q3 and row.gbps == pytest.approx(row.bytes / row.median / 1e9)
    assert ours.launches == 1 and loop.launches > 10 * 30
    assert ours.bytes_per_parameter == pytest.approx(16, abs=0.1) and ours.host > 0 and ours.peak_memory is not None


def test_bytes_of_a_step():
    for case, states in (("SGD", 1), ("AdamW", 2), ("AMSGrad", 3)):
        footprint = Footprint.of(tiny(case))
        assert footprint == Footprint(4, (4,) * states)
        assert footprint.moved(tiny(case)) == 300 * 4 * (3 + 2 * states)
        assert {footprint.moved(tiny(case, **how)) for how in ({"clip": 1.0}, {"amp": True})} == {
            1200 * (4 + 2 * states)
        }
    assert Footprint.of(tiny(dtype="bf16")) == Footprint(2, (4, 4))
    for nbytes, measured in product((28, 28_000, 28_000_000), (0, 4)):
        assert nbytes <= limits.limits("cpu", nbytes, 2, measured)["limit"].nbytes <= nbytes + 28 + 4 * measured


@needs_cpu_engine
def test_bytes_are_those_of_ones_own_states():
    """In bf16 ours keeps states of fp32, torch's of bf16, which are less to move."""
    rows = {row.variant: row for row in bench("torch-fused").run(tiny(suite="30x64", dtype="bf16"))}
    ours, fused = rows["fusedopt-cpu"], rows["torch-fused"]
    assert ours.bytes == 30 * 64 * (3 * 2 + 2 * 8) and fused.bytes == 30 * 64 * (3 * 2 + 2 * 4)
    assert (ours.states, fused.states, fused.note) == ("float32", "bfloat16", "its states are bfloat16")
    assert "°" in table.name(fused) and "°" not in table.name(ours)


def test_variants_take_turns():
    order = []
    steps = {name: partial(order.append, name) for name in "abc"}
    timings = timing.interleave(steps, timing.Stopwatch(torch.device("cpu"), "cold"), 2, 1, lambda: None)
    assert "".join(order) == "abc" * 3 and timings.rounds == 2


def test_a_variant_that_raises_does_not_end_the_race():
    order = []

    def fails():
        order.append("x")
        if len(order) > 4:
            raise ValueError("later")

    steps = {"a": partial(order.append, "a"), "x": fails, "b": partial(order.append, "b")}
    timings = timing.interleave(steps, timing.Stopwatch(torch.device("cpu"), "cold"), 2, 1, lambda: None)
    assert "".join(order) == "axbaxbab" and str(timings.failed["x"]) == "later"
    assert timings.rounds == 2 and timings.ratio("a", "b").median > 0


def test_ratios_are_taken_round_by_round():
    """The machine is twice as slow in every other round, for both alike."""
    seconds = {"a": [1, 2, 1], "b": [3, 6, 3]}
    timings = timing.Timings(seconds, 0.0)
    assert timings.seconds("a").noise > timing.NOISY
    assert timings.ratio("b", "a") == timing.Spread(3, 3, 3)


CHECKED = [({}, dtype) for dtype in workload.DTYPES] + [({"clip": 1.0}, dtype) for dtype in workload.DTYPES]
CHECKED += [({"amp": True, "clip": 1.0}, dtype) for dtype in ("fp32", "fp64", "bf16")]  # a GradScaler refuses fp16


@pytest.mark.parametrize("options, dtype", CHECKED, ids=str)
def test_a_wrong_step_is_seen(options, dtype):
    w = tiny(dtype=dtype, **options)
    assert check.objection(adamw(), w) is None
    mistakes = ({"weight_decay": 0.499}, {"lr": 0.0499}, {"betas": (0.9, 0.9989)}, {"amsgrad": True}, {"eps": 2e-8})
    for wrong in mistakes:
        assert check.objection(adamw(**wrong), w), wrong


@pytest.mark.parametrize("case", [case for case in CASES if torch_optim.peers(CASES[case], "cpu")])
def test_torch_computes_the_same_update(case):
    offered = [peer for peer in torch_optim.peers(CASES[case], "cpu") if not peer.compiles]
    assert len(offered) >= 2
    for peer in offered:
        assert check.objection(peer, tiny(case)) is None, peer.name


def test_a_step_that_is_wrong_in_half_precision_only_is_seen():
    """As torch 2.13's fused SGD on CPUs is, which skips elements of bf16 and fp16."""

    def skips(groups, **options):
        optimizer = torch.optim.AdamW(groups, **options)
        whole, step = optimizer.param_groups[0]["params"][0], optimizer.step

        def some():
            before = whole.detach()[-12:].clone()
            step()
            if whole.dtype == torch.bfloat16:
                whole.data[-12:] = before

        optimizer.step = some
        return optimizer

    peer = replace(adamw(), make=skips)
    assert check.objection(peer, tiny()) is None
    assert "bf16" in check.objection(peer, tiny(dtype="bf16"))


@pytest.mark.filterwarnings("ignore")  # some are older than torch's deprecations
@pytest.mark.parametrize("case", ["AdaBound", "AdamP", "Lion", "NAdamW", "Prodigy", "SGDP"])
def test_the_authors_compute_the_same_update(case):
    authors = ("adabound", "adamp", "lion-pytorch", "prodigyopt", "timm")
    installed = [peer for peer in peers.offered(CASES[case], "cpu") if peer.package in authors]
    for peer in installed:
        if peer.version() is None:
            pytest.skip(f"{peer.package} is not installed")
        assert check.objection(peer, tiny(case)) is None, peer.name


def test_nobody_races_a_wrong_step(monkeypatch):
    declared = replace(adamw(eps=1e-4), name="declared", differs="it has another eps")
    offer(monkeypatch, adamw(weight_decay=0.5), declared)
    b = bench("other", "declared")
    rows = {row.variant: row for row in b.run(tiny())}
    assert "other" not in rows and any("does not compute the same update" in line for line in b.notes)
    assert rows["declared"].same_update is False and rows["declared"].note == "it has another eps"
    assert "≠" in table.name(rows["declared"]) and table.fastest_peer(list(rows.values())) is None


def broken(groups, **options):
    raise OSError("no compiler\nand more lines")


def test_who_cannot_run_is_left_out_with_a_line(monkeypatch):
    missing = Peer("missing", "no-such-package", broken, {})
    broke = Peer("broke", "torch", broken, {})
    many = replace(adamw(), name="many", most_tensors=2)
    other_storage = replace(adamw(), name="small", storage="8bit")
    offer(monkeypatch, missing, broke, many, other_storage)
    b = bench("missing", "broke", "many", "small")
    assert {row.variant for row in b.run(tiny())} == {f"fusedopt-{ENGINE}", "limit"}
    missing, broke, many = b.notes
    assert "no-such-package is not installed" in missing
    assert "broke" in broke and broke.endswith("OSError: no compiler")
    assert "many" in many and "3 tensors" in many
    b.run(tiny())
    assert len(b.notes) == 3


def test_memory_decides_who_takes_part(monkeypatch):
    """Peers that do not fit beside each other are raced one after the other; ours takes part each time."""
    seen = []
    race = arena.Arena.race
    monkeypatch.setattr(
        arena.Arena, "race", lambda self, others, first: seen.append(others) or race(self, others, first=first)
    )
    offer(monkeypatch, *(replace(adamw(), name=name) for name in "abc"))
    w = tiny(suite="10x1000")
    tensors, streams, states = 80_000, limits.resident_bytes("cpu", 280_000, 2), 80_000
    base = 2**12 + 2 * tensors + streams + states  # once more the tensors, for what a step takes

    def run(room):
        seen.clear()
        monkeypatch.setattr(memory, "room", lambda device: room / measure.USABLE)
        b = bench("a", "b", "c")
        rows = b.run(w)
        return [row.variant for row in rows], [len(others) for others in seen], b.notes

    everyone = [f"fusedopt-{ENGINE}", "limit", "a", "b", "c"]
    names, batches, notes = run(base + 3 * states + 1)
    assert sorted(names) == sorted(everyone) and batches == [3] and not notes
    names, batches, notes = run(base + states + 1)
    assert sorted(names) == sorted(everyone) and batches == [1, 1, 1] and not notes
    names, batches, notes = run(base + 1)
    assert sorted(names) == sorted(everyone[:2]) and "a, b, c left out" in notes[0]
    names, batches, notes = run(base - 10)
    assert not names and "it needs" in notes[0]


@needs_cpu_engine
def test_sweeps_plots_and_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(standard, "COUNTS", (1, 10))
    monkeypatch.setattr(standard, "MEGABYTES", (1, 2))
    monkeypatch.setattr(standard, "GROUPS", (1, 5))
    monkeypatch.setattr(standard, "GROUPED", "20x50")
    sweeps = [word for sweep in standard.SWEEPS for word in ("--sweep", sweep)]
    arguments = ["--suite", "20x50", *sweeps, "--device", "cpu", "--engine", "cpu", "--repeats", "2"]
    arguments += ["--peer", "torch-fused"]
    assert main(["bench", *arguments, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path)]) == 0
    rows = Result.load(tmp_path / "r.json").rows
    assert [row.tensors for row in rows if row.sweep == "tensors" and row.ours] == [1, 10]
    assert len({row.numel for row in rows if row.sweep == "tensors"}) == 2  # 2**22 and its multiple of ten below
    assert [table.swept(row) for row in rows if row.sweep == "size" and row.ours] == pytest.approx([1, 2], rel=1e-3)
    assert [row.groups for row in rows if row.sweep == "groups" and row.ours] == [1, 5]
    assert main(["bench", "report", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for name in ("limit", "bytes", *standard.SWEEPS):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in page
    assert all(row.command in page for row in rows)


@needs_cpu_engine
def test_a_workload_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    run = Bench.run

    def fails(self, w, sweep=None):
        if w.case.name == "Lion":
            raise RuntimeError("out of luck")
        return run(self, w, sweep)

    monkeypatch.setattr(Bench, "run", fails)
    arguments = ["--suite", "2x10", "--engine", "cpu", "--device", "cpu", "--peer", "none", "--repeats", "1"]
    arguments += ["--optimizer", "Lion", "--optimizer", "AdamW", "--json", str(tmp_path / "r.json")]
    assert main(["bench", *arguments]) == 1
    kept = Result.load(tmp_path / "r.json")
    assert {row.optimizer for row in kept.rows} == {"AdamW"} and "out of luck" in kept.notes[0]


@needs_cpu_engine
def test_peers_that_were_asked_for_are_missed(capsys):
    arguments = ["--suite", "2x10", "--engine", "cpu", "--device", "cpu", "--peer", "apex", "--repeats", "1"]
    assert main(["bench", *arguments]) == 0
    assert "apex: left out" in capsys.readouterr().out
    assert main(["bench", *arguments[:-4], "--optimizer", "NAdamW", "--peer", "all", "--repeats", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not for tensors on cpu: apex," in said and "transformer-engine" in said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_standard_set_covers_all(device):
    entries = standard.standard(device)
    keys = [(entry.workload.title(), entry.sweep) for entry in entries]
    assert len(keys) == len(set(keys))
    assert {entry.workload.case.name for entry in entries} == set(CASES)
    assert {entry.workload.suite.name.split(":")[0] for entry in entries} >= set(suites.KINDS)
    assert {entry.sweep for entry in entries} == {None, *standard.SWEEPS}
    assert {case.optimizer for case in CASES.values()} == set(fusedopt.optimizers.__all__)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "gpt3"], "no suite is called 'gpt3'"),
        (["--suite", "gpt2", "--groups", "149"], "148 tensors"),
        (["--optimizer", "Newton"], "Newton"),
        (["--peer", "nobody"], "nobody"),
        (["--repeats", "0"], "positive"),
        (["--clip", "-1"], "positive"),
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "meta"),
        (["--amp", "--dtype", "fp16"], "GradScaler"),
        (["--sweep", "size", "--groups", "3"], "--groups"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["compare", "no.json", "no.json"], "no.json"),
        (["report", "no-folder"], "no-folder"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message, capsys):
    try:
        status = main(["bench", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_streams_in_triton():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from fusedopt.bench import streams

    *updated, gradient = [torch.full((2 * streams.TILE,), k) for k in (1.0, 2.0, 3.0, 1.0)]
    streams.touch(updated, gradient)
    assert [set(u.tolist()) for u in updated] == [{1.5}, {2.0}, {2.5}]
    streams.measure([gradient, *updated], sums := torch.zeros(2))
    assert sums.tolist() == [streams.TILE * 7.0] * 2


def test_groups_differ_and_single_elements():
    w = replace(tiny(), suite=suites.find("10x7").regrouped(5))
    groups = Tensors(w).groups()
    assert len({group["lr"] for group in groups}) == len({group["weight_decay"] for group in groups}) == 5
    assert {p.numel() for p in Tensors(w, single=True).params} == {1}
