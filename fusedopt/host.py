"""What reads an optimizer before every step: the host extension, or where it is not built, Python."""

# The host is bound to what torch has beneath its public names.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from fusedopt import checks, memory, options, storage
from fusedopt.aliases import Group, ParamGroups
from fusedopt.context import Context
from fusedopt.operands import FLOATING
from fusedopt.options import MASTER
from fusedopt.rule import LR, WEIGHT_DECAY, Hyper, Rule
from fusedopt.scan import GroupSpec, Key, Names, Scan
from fusedopt.state import New

REPORT = Path(__file__).parent / "_build_report.json"
CHECKED = os.environ.get("FUSEDOPT_CHECK_SCAN", "0") not in ("", "0")

T = TypeVar("T")


class Built(TypedDict):
    """What the installation made of an engine.

    Attributes:
        failure: Why it was left out; None if it was not.
        compiler: What compiled it.
        targets: What for.
        seconds: How long that took.
    """

    failure: str | None
    compiler: str
    targets: list[str]
    seconds: float


# Symbols of libtorch and libc10. What the C ABI does not tell comes from at::native, c10 and at::impl.
_FUNCTIONS = {
    **{
        f"{prefix}_{name}": f"{prefix}_{name}"
        for prefix, names in {
            "aoti_torch_get": (
                "layout dim sizes strides dtype device_type device_index storage_size storage_offset data_ptr"
            ),
            "torch_get": "const_data_ptr",
            "aoti_torch": "is_defined",
        }.items()
        for name in names.split()
    },
    "is_conj": "_ZN2at6native7is_conjERKNS_6TensorE",
    "is_neg": "_ZN2at6native6is_negERKNS_6TensorE",
    "gradient": "_ZNK3c1010TensorImpl4gradEv",
    "has_function_mode": "_ZN2at4impl27torch_function_mode_enabledEv",
}
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (*FLOATING, torch.complex64, torch.complex128, torch.complex32, torch.uint8)
}

_DLPACK = 1 << 16  # dtypes from here on are DLPack's own numbers


class Facts(Protocol):
    """What a scan in C++ vouches for."""

    def facts(self) -> list[tuple[Tensor, int, int, list[int], list[int], int]]:
        """Of every tensor its address, dtype, shape, strides, and the bytes of its storage or -1."""
        ...


class StepScan(Protocol):
    """The scan of what a device steps: ``Scan``, or ``DeviceTable`` of the host extension."""

    def scan(self, threads: int) -> bool:
        """Whether the tables are valid; if not, planning anew says what is wrong."""
        ...

    def rebind(self, param_groups: ParamGroups) -> None:
        """The same groups stand in another list now."""
        ...

    def check(self, threads: int) -> None:
        """Raise if any tensor or gradient is not what it was in the last scan."""
        ...

    def write(self, words: Tensor) -> bool:
        """Put the gradients' words and the groups' records there, see fusedopt/layout.py; whether anything changed."""
        ...

    def commit(self) -> None:
        """The step happened: states that were new are so no more."""
        ...

    def increment_versions(self) -> None:
        """Tell autograd that the parameters with gradients were written."""
        ...

    def release(self) -> None:
        """Let go of this step's gradients."""
        ...


_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # another thread may have had it
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
_path: str | None = None  # how tensors are read, once that was found out
_numbers: dict[str, int] = {}  # of the C ABI: dtypes and layouts
_dtensor: type | None = None  # the class that the host knows


@cache
def _imported(name: str) -> ModuleType | str:
    """An extension, or why it does not import: that stays so as long as the process."""
    try:
        return import_module(f"fusedopt.{name}")
    except ImportError as error:
        return str(error)


def extension(name: str, part: str) -> ModuleType:
    """An extension of the package.

    Args:
        name: The module's.
        part: Of the build that makes it.

    Raises:
        ImportError: With the real reason.
    """
    found = _imported(name)
    if isinstance(found, str):
        raise ImportError("; ".join(filter(None, (build_failure(part), found))))
    return found


@cache
def build_report() -> dict[str, Built]:
    """What the installation made of each engine: its failure or None, compiler, targets and seconds."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else {}


def build_failure(part: str) -> str | None:
    """Why the installation left an extension out."""
    if not build_report():
        return "the extension was not built"
    reason = build_report()[part]["failure"]
    return f"it was not built: {reason}" if reason else None


def load() -> ModuleType:
    """The host extension, which has learned how to read torch's tensors.

    Raises:
        ImportError: With the real reason; another call tries again.
    """
    global _path
    host = extension("_host", "cpu")
    if _path is None:
        with _lock:
            if _path is None:
                _path = without_modes(lambda: _bind(host))
    return host


def reading_path() -> str:
    """How tensors are read before every step: through torch's C ABI, through DLPack, or in Python."""
    if os.environ.get("FUSEDOPT_HOST") == "python":
        return "Python"
    try:
        load()
    except ImportError:
        return "Python"
    assert _path is not None
    return _path


def without_modes(call: Callable[[], T]) -> T:
    """What a call returns where no mode, transformation or default device of torch's is on: they belong to threads."""
    with ThreadPoolExecutor(1, "fusedopt") as thread:
        return thread.submit(call).result()


def _number(value: object) -> float:
    return checks.number(value, "", "")


def _bind(host: ModuleType) -> str:
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"torch {torch.__version__} has no DLPack C exchange API; 2.10 or newer has")
    host.bind_torch(
        {
            "tensor_type": Tensor,
            "parameter_type": torch.nn.Parameter,
            "exchange_api": capsule,
            "grad": torch._C.TensorBase.grad,
            "dispatch": memory.NO_DISPATCH,
            "number": _number,
            "increment_version": torch.autograd.graph.increment_version,
        }
    )
    wanted = os.environ.get("FUSEDOPT_HOST", "abi")
    return "torch's C ABI" if wanted != "dlpack" and bind_abi(host) else "DLPack"


def bind_abi(host: ModuleType) -> bool:
    """Read tensors through torch's C ABI, if it says of some the same as torch does in Python."""
    try:
        library = ctypes.PyDLL(torch._C.__file__)  # through which all that it links is found
        addresses = {
            name: ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value for name, symbol in _FUNCTIONS.items()
        }
        if hasattr(library, _BUMP_VERSION):
            addresses["bump_version"] = ctypes.cast(getattr(library, _BUMP_VERSION), ctypes.c_void_p).value
        numbers = {name: getattr(library, f"aoti_torch_dtype_{name}")() for name in _DTYPES.values()}
        numbers["strided"] = library.aoti_torch_layout_strided()
        numbers["cpu"] = library.aoti_torch_device_type_cpu()
    except (OSError, AttributeError):
        return False
    probes = _probes()
    if not host.bind_abi(addresses, numbers, probes):
        return False
    with torch.overrides.BaseTorchFunctionMode():
        sees_mode = host.has_function_mode()
    if sees_mode and not host.has_function_mode() and all(host.geometry(t) == _facts(t, numbers) for t in probes):
        _numbers.update(numbers)
        return True
    host.forget_abi()
    return False


def _probes() -> list[Tensor]:
    """Tensors of distinctive geometry and every dtype, lazily conjugated and negated ones among them."""
    tensors: list[Tensor] = []
    for i, dtype in enumerate(dtype for dtype in _DTYPES if dtype != torch.complex32):  # torch warns of that one
        flat = torch.zeros(20_000, dtype=dtype, device="cpu")
        tensors.append(flat.as_strided((2, 3, 5), (307, 67, 11), 37 + i))
        floats = dtype.is_floating_point or dtype.is_complex
        tensors.append(torch.nn.Parameter(flat.as_strided((7, 2), (131, 17), 53), requires_grad=floats))
    tensors.append(torch.zeros(9_000, device="cpu").as_strided((3, 2, 2, 5, 1, 2), (211, 101, 29, 3, 1, 7), 71))
    tensors[-1].grad, tensors[1].grad = torch.zeros_like(tensors[-1]), torch.ones_like(tensors[1])
    z = torch.zeros(7, 3, dtype=torch.complex64, device="cpu")
    return [*tensors, z.mH, z.conj().imag, z.mH.imag, torch.zeros((), device="cpu"), torch.zeros(0, 4, device="cpu")]


def _facts(t: Tensor, numbers: dict[str, int]) -> tuple[object, ...]:
    """What torch says in Python; see csrc/host/module.cpp."""
    dtype = numbers[_DTYPES[t.dtype]]
    places = (numbers["cpu"], _index(t.device))
    storage = (t.untyped_storage().nbytes(), t.storage_offset())
    gradient = 0 if t.grad is None else t.grad._cdata
    return (t.data_ptr(), dtype, list(t.shape), list(t.stride()), *places, *storage, t.is_conj(), t.is_neg(), gradient)


def _index(device: torch.device) -> int:
    index = cast("int | None", device.index)
    return -1 if index is None else index


def check_scan(tables: Facts) -> None:
    """What a scan vouches for is what torch says, tensor by tensor. FUSEDOPT_CHECK_SCAN=1 asks for it after every scan.

    Raises:
        AssertionError: If it is not.
    """
    for t, address, dtype, shape, strides, nbytes in tables.facts():
        seen = (address, shape, strides, False, False)
        said = (t.data_ptr(), list(t.shape), list(t.stride()), t.is_conj(), t.is_neg())
        assert seen == said, (seen, said)
        assert dtype >= _DLPACK or dtype == _numbers[_DTYPES[t.dtype]], (dtype, t.dtype)
        assert nbytes in (-1, t.untyped_storage().nbytes()), (nbytes, t.untyped_storage().nbytes())


def group_spec(
    rule: type[Rule], group: Group, kernel: object, hyper: Sequence[str], numbers: list[tuple[Hyper | None, int]]
) -> GroupSpec:
    """What a scan must know of a param group.

    Args:
        rule: The optimizer's.
        group: The group.
        kernel: Its kernel.
        hyper: Names of the kernel's hyperparameters.
        numbers: Where the engine's own are, see ``fusedopt.options.numbers``.
    """
    by_name = {h.name: h for h in rule.hyper}
    most = checks.LARGEST_FLOAT if checks.is_narrow(group) else float("inf")
    weight_decay = WEIGHT_DECAY if WEIGHT_DECAY in rule.engine_hyper() else None
    keys = [
        Key.of(h, rule.size_of(h) if h is not None else 0, most)
        for h in (LR, weight_decay, *(by_name[name] for name in hyper))
    ]
    keys += [Key.of(h, size, most) for h, size in numbers]
    average = options.average_state(group)
    return GroupSpec(
        kernel,
        keys,
        [(key, bool(group.get(key))) for key in (*rule.switches(), *options.DEFAULTS)],
        rule.decoupled(),
        average and average.name,
        options.counts(rule, group),
        group.get(MASTER),
        storage.master_state(group),
        [spec.signed for spec in rule.active_states(group)],
        [(key, group[key]) for key in options.STORAGE if key in group],
    )


def know_dtensors(host: ModuleType) -> None:
    """DTensors are read as the parts that are here, once anybody has imported them."""
    global _dtensor
    kind = memory.dtensor_type()
    if kind is not _dtensor:
        host.bind_dtensor(kind)
        _dtensor = kind


def device_scan(
    context: Context, hyper: tuple[str, ...], members: list[int], new: New, device: torch.device
) -> StepScan:
    """A scan for an engine that keeps counters on a device and looks rows up in tables there.

    Args:
        context: Of the optimizer.
        hyper: Names of the rule's hyperparameters, in the order of the engine.
        members: Which parameters the engine steps, counted through all groups; all are on the device.
        new: Those whose states or averages were made for the coming step.
        device: Where they are.
    """
    rule, groups = context.rule, list(context.param_groups)  # which may change meanwhile
    numbers = [options.numbers(groups, group) for group in groups]
    try:
        if os.environ.get("FUSEDOPT_HOST") == "python":
            raise ImportError
        host = load()
    except ImportError:
        others = storage.own_names(rule)
        kernels: list[object] = [
            Names([s.name for s in options.states_of(rule, g)], list(options.scalars_of(rule, g)), others)
            for g in groups
        ]
        make = partial(Scan, device=device)
    else:
        know_dtensors(host)
        states = [[s.name for s in rule.active_states(g)] for g in groups]
        kernels = [host.describe(rule.name, its, list(rule.scalars), list(hyper)) for its in states]
        make = host.DeviceTable
    specs = [group_spec(rule, g, kernel, hyper, k) for g, kernel, k in zip(groups, kernels, numbers, strict=True)]
    return make(context.param_groups, specs, context.state, members, *new)
