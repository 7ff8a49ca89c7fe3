import gc
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

# Before anything imports Triton: without a GPU, its kernels are interpreted.
INTERPRETED = not (torch.cuda.is_available() or torch.xpu.is_available())
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import support  # noqa: E402

from fusedopt import engines  # noqa: E402
from fusedopt.verification.cases import CASES  # noqa: E402

# Names of the engines to test, with spaces between; all where it is not set.
CHOSEN = os.environ.get("FUSEDOPT_TEST_ENGINES", " ".join(engines.ENGINES)).split()

if INTERPRETED and "cuda" in CHOSEN and shutil.which("g++"):
    import cuda_on_threads

    extension = cuda_on_threads.build()
    engines.cuda.load = lambda: extension  # the CUDA engine's own kernels, on host threads

# Where the tests' tensors are the engine must be too: on the CPU for AVAILABLE ones, on a GPU for those ON_GPU.
HOMES = {name: e.home() for name, e in engines.ENGINES.items() if name in CHOSEN and e.available() is None}
AVAILABLE = [name for name, home in HOMES.items() if home.type == "cpu"]
ON_GPU = [name for name in HOMES if name not in AVAILABLE]
collect_ignore = ["test_gpu.py"] if INTERPRETED else []
if "triton" in AVAILABLE:
    import interpreter

    interpreter.patch()


def engine_fixture(names, in_python=False):
    """The fixture ``engine`` of tests that may be of engines ON_GPU as well, and so take a ``device``.

    Args:
        names: Of the engines.
        in_python: Whether what engines on a device scan is scanned in Python, too, as where no C++ compiler built the
            other scan. Their plans are the same: Triton's, where it is not the only one, is for the night.
    """
    lenient = pytest.mark.filterwarnings("default")  # of streams, contexts and prototypes: they differ by version
    params = [pytest.param(name, marks=[lenient] if name in ON_GPU else []) for name in names]
    for name in [name for name in ("cuda", "triton") if name in AVAILABLE] if in_python else ():
        params.append(
            pytest.param(f"{name}, scanned in Python", marks=[pytest.mark.nightly] if len(params) > len(names) else [])
        )

    @pytest.fixture(params=params)
    def engine(request, monkeypatch):
        name, _, how = request.param.partition(", ")
        if how:
            monkeypatch.setenv("FUSEDOPT_HOST", "python")
        return name

    return engine


engine = engine_fixture(AVAILABLE)


@pytest.fixture
def device(engine):
    """Where tensors are that the engine steps."""
    return HOMES[engine]


@pytest.fixture(scope="session")
def ranks():
    """What runs functions on several ranks."""
    import many

    found = many.Ranks(4)
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "numprocesses", None):  # what workers inherit, whose OpenMP is not loaded yet
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin keep other processes from the cores
    if support.FILE and not hasattr(config, "workerinput"):
        config.pluginmanager.register(support.Recorder(support.FILE))


# What Triton's interpreter takes longest for and other tests or engines go through as well: which calls are for the
# night. Its kernels are the same for all types of elements, and its plans are the cuda engine's.
OPTIONS_INTERPRETED_BY_DAY = (
    "AdamW, cautious",
    "AdamW, EMA",
    "ASGD, Lookahead",
    "SGD momentum, noise",
    "LARS, EMA",
)
FIRST_VARIANTS = {case.optimizer: case.name for case in sorted(CASES, key=lambda case: -len(case.name))}.values()
# Of what does not depend on the rule.
SOME = ("AdamW", "LAMB", "Lion", "SGD")
# Of 300 steps: a rule of each kind that engines tell apart, by what it adds up, concludes and counts. The others are
# held to eager in double precision for a step, by day too.
GATED_BY_DAY = ("AMSGD", "AdamW", "KoalaV", "LAMB", "Lion", "NSGD", "SGD", "SWATS")
RESUMED_BY_DAY = ("AdamW", "SGD momentum", "NAdam", "LAMB")
STORED_BY_DAY = (
    (torch.float32, "8bit", None),
    (torch.bfloat16, "8bit", "split"),
    (torch.bfloat16, torch.bfloat16, "stochastic"),
)
INTERPRETED_AT_NIGHT = {
    "test_gate": lambda case, dtype: (
        case.name not in GATED_BY_DAY or (dtype != torch.float32 and (case.name, dtype) != ("AdamW", torch.bfloat16))
    ),
    "test_gate_of_options": lambda case, dtype: dtype != torch.float32 or case.name not in OPTIONS_INTERPRETED_BY_DAY,
    "test_resume_of_options_is_bit_exact": lambda name, average: name != "SGD",
    "test_resume_is_bit_exact": lambda case: case.name not in RESUMED_BY_DAY,
    "test_resume_of_half_precision_is_bit_exact": lambda name, half: name != "AdamW" or half != torch.bfloat16,
    "test_state_to_torch": lambda name, implementation: bool(implementation),
    "test_many_steps_keep_to_the_model": lambda state_dtype, master, steps: master != "split",
    "test_sums_are_those_of_one_process": lambda kind, world: kind != "mixed" or world > 2,
    "test_memory_of_every_kind": lambda of, scope, kind: kind != "strided",
    "test_complex_numbers_are_pairs": lambda of, scope: scope == "all",
    "test_gradients_of_either_type_step_alike": lambda name, state_dtype: name not in ("AdamW", "Lion", "SGD"),
    "test_steps_in_the_backward_pass": lambda state_dtype, master: (state_dtype, master) != ("8bit", "split"),
    "test_the_same_bits_every_time_and_after_a_resume": lambda of, scope: scope != "channel",
    "test_passes_by_themselves": lambda of, scope: scope not in ("channel", "group"),
    "test_doubles": lambda of, scope: scope == "all",
    "test_halves": lambda of, scope, dtype: scope == "all" or dtype == torch.float16,
    "test_steps_are_those_of_eager_in_double_precision": lambda case, t: t not in (1, 6),
    "test_it_learns": lambda: True,
    "test_resumes_bit_for_bit": lambda name, more: name != "KoalaM" or bool(more),
    "test_one_vector_switches_when_its_rate_settles": lambda scope: scope != "group",
    "test_resumes_bit_for_bit_on_either_side_of_the_switch": lambda after: after != 2,
    "test_steps_end_at_unit_length": lambda name, kind: name != "LAMB",
    "test_steps_are_those_of_step": lambda name: name not in ("AdamW", "LAMB", "SWATS"),
    "test_steps_are_those_of_the_slow_model": lambda dtype, state_dtype, master: (
        (dtype, state_dtype, master) not in STORED_BY_DAY
    ),
    "test_tensors_of_all_dimensions": lambda name, options: name != "AdamP" or bool(options),
    "test_thousands_of_small_rows": lambda programs, rows: programs == 1 or rows != "groups",
    "test_what_was_moved_is_seen": lambda scan: True,
    "test_a_resumed_run_is_the_same_bit_for_bit": lambda storage: storage != ("8bit", "split"),
    "test_steps_are_the_textbooks": lambda clip, of, scope: clip is None,
    "test_many_small_tensors_and_large_ones": lambda of, scope: scope not in ("tensor", "all"),
    "test_masters_follow_a_float32_run_bit_for_bit": lambda name, grad_dtype, more: name != "LAMB" or bool(more),
    "test_states_convert_between_all_ways_to_store": lambda: True,
    "test_every_optimizer_takes_every_storage": lambda name: name not in ("AdamW", "LAMB", "SGD"),
    "test_the_step_of_the_description": lambda norm, granularity, more: norm != "l2" or bool(more),
}
# Files whose tests go through what is not the engine's: another one takes them by day, but for these.
WHOLE_FILES_AT_NIGHT = {
    "triton": (
        *("test_muon", "test_muon_state", "test_prodigy", "test_schedule_free", "test_ranks_field"),
        *("test_mbf", "test_entropy_sgd", "test_replicated_sgd", "test_ranks_beyond"),
    ),
    "cuda": ("test_ranks_field", "test_ranks_beyond"),
    "eager": ("test_ranks_field", "test_ranks_beyond"),
}
STILL_BY_DAY = (
    *("test_two_launches", "test_a_swap_is_one_launch", "test_matrices_without_gradients", "test_fsdp2"),
    *("test_as_the_whole_matrix", "test_as_loops_over_copies", "test_as_the_textbook"),
    "test_a_loop_begins_where_a_device_skipped_its_first_step",
)
# Of other engines: types of elements and numbers of ranks that another one goes through by day.
AT_NIGHT = {
    "triton": INTERPRETED_AT_NIGHT,
    "cuda": {
        "test_gate": INTERPRETED_AT_NIGHT["test_gate"],
        "test_thousands_of_small_rows": lambda programs, rows: programs == 1 or rows == "few counters",
        "test_resume_is_bit_exact": lambda case: case.name not in RESUMED_BY_DAY,
        "test_gradients_of_either_type_step_alike": lambda name, state_dtype: name not in SOME,
        "test_many_small_tensors_and_large_ones": lambda of, scope: scope not in ("tensor", "all"),
        "test_skip_leaves_everything": lambda name, **_: name not in SOME,
        "test_steps_are_those_of_one_process": lambda kind, world: world > 2 or kind not in ("fsdp", "mixed"),
        "test_sums_are_those_of_one_process": lambda kind, world: world > 2,
    },
    "eager": {
        "test_gate": lambda case, dtype: (
            case.name not in (*GATED_BY_DAY, "Adam", "Rprop")
            or (dtype != torch.float32 and (case.name, dtype) != ("AdamW", torch.bfloat16))
        ),
        "test_resume_is_bit_exact": lambda case: case.name not in RESUMED_BY_DAY,
        "test_steps_are_those_of_one_process": lambda kind, world: world > 2 or kind not in ("fsdp", "mixed"),
        "test_sums_are_those_of_one_process": lambda kind, world: world > 2,
    },
    "cpu": {
        "test_steps_are_those_of_one_process": lambda kind, world: world > 2 and kind not in ("hsdp", "two dimensions"),
        "test_sums_are_those_of_one_process": lambda kind, world: world > 2 and kind != "two dimensions",
    },
    None: {  # of tests of one engine
        "test_sums_of_tiles_and_programs": lambda of, scope, programs: programs == 1 or scope in ("group", "all"),
        "test_sums_have_the_same_bits_whoever_adds_them_up": lambda of, scope: scope in ("group", "all"),
        "test_one_launch_of_each_kernel_for_all_groups_and_dtypes": lambda name: name not in SOME,
        "test_first_use_under_a_mode": lambda mode: mode != "inference",
        "test_what_happens_between_any_two_calls": lambda deed, mixed, third: third > 0 or not mixed,
        "test_accelerate_clips_the_norm_of_the_whole": lambda kind: kind == "ddp",
        "test_shards_are_stepped_by_all_in_turn": lambda: True,
        "test_more_than_two_to_the_31_elements": lambda: True,
        "test_a_mesh_that_a_rank_is_outside_of": lambda: True,
        "test_textbook_loop_agrees_with_oracle": lambda case: True,
        "test_threads_do_not_race_and_give_one_threads_result": lambda program: program != "races",
        "test_every_isa_level_passes_the_gate": lambda level: level == "v2",
        "test_one_program_takes_all_registers_of_a_processor": lambda: True,
    },
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        engine = params.pop("engine", None)
        is_late = AT_NIGHT.get(engine, {}).get(item.name.split("[")[0])
        if item.path.stem in WHOLE_FILES_AT_NIGHT.get(engine, ()) and item.name.split("[")[0] not in STILL_BY_DAY:
            item.add_marker(pytest.mark.nightly)
        if is_late(**params) if is_late else engine == "triton" and params.get("name", SOME[0]) not in SOME:
            item.add_marker(pytest.mark.nightly)
        if engine in ("cpu", "cuda", "eager") and item.name.startswith("test_gate_of_options"):
            if not _is_for_the_day(engine, **params):
                item.add_marker(pytest.mark.nightly)
    if support.FILE:
        items[:] = filter(support.mark, items)


def _is_for_the_day(engine, case, dtype):
    """On the CPU one variant of each optimizer in fp32, and with an average in bf16; elsewhere fewer."""
    variant, _, option = case.name.rpartition(", ")
    is_first, is_narrow = variant in FIRST_VARIANTS, dtype == torch.float32
    if engine == "cpu":
        return is_first and (is_narrow or option == "EMA") and dtype in (torch.float32, torch.bfloat16)
    return case.name in OPTIONS_INTERPRETED_BY_DAY and is_narrow


def pytest_collection_finish():
    """What is there for the whole run need not be searched again by every collection of garbage."""
    torch.optim.SGD([torch.ones(1)])  # the first one imports half of what torch has
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or Triton's bindings call it a leak when Python ends


def pytest_report_header():
    reasons = {name: module.available() for name, module in engines.ENGINES.items()}
    lines = [f"engine {name}: {reason or 'available'}" for name, reason in reasons.items()]
    return [*lines, *(f"{file}: not collected, torch sees no GPU" for file in collect_ignore)]


GPU = {"device": "NVIDIA H200", "arch": "90", "versions": {"torch": "2.13"}, "platform": "Linux"}


@pytest.fixture
def visit(monkeypatch, tmp_path):
    """bench/gpu.py, which runs before anything of fusedopt can be imported; its machine has a GPU."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which it adds its own folder, for what follows
    monkeypatch.delitem(sys.modules, "visit_parts", raising=False)
    spec = importlib.util.spec_from_file_location("visit", Path(__file__).parents[1] / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "visit", module)
    spec.loader.exec_module(module)
    module.lists = sys.modules["visit_parts"]
    monkeypatch.setattr(module, "STAGE", tmp_path / "stage")
    monkeypatch.setattr(module, "BUILD_REPORT", "no_build_report.json")
    monkeypatch.setattr(module, "GRACE_SECONDS", 5)
    monkeypatch.setattr(module, "STAGE_SECONDS", 0)
    monkeypatch.setattr(module, "machine", lambda: {**GPU})
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for kind, handler in before.items():
        signal.signal(kind, handler)
