"""``fusedopt inspect``: registers, spills, access widths and loads under way of compiled kernels. Needs no GPU.

``loads_128``, ``loads_other``, ``stores_128`` and ``stores_other`` count the accesses of tensor data in the loops
over full tiles, 16 bytes wide for each thread or not; the same names behind ``kernel_`` count all accesses of
global memory in the kernel: also of tables, and of what is left over beside full tiles.

``norm_loads_in_flight`` says how many 16-byte loads the best innermost loop without stores issues before it uses the
value of any of them: that of the norm, whose main loop it is. ``scalar_loads_in_flight`` says the same of narrower
loads in the best innermost loop with stores and without 16-byte accesses: of what is left over beside full tiles. Both
are null for AMD's GPUs.

JSON::

    {"kernels": [{"name", "arch", "registers", "spills", "loads_128", "loads_other", "stores_128", "stores_other",
                  "kernel_loads_128", "kernel_loads_other", "kernel_stores_128", "kernel_stores_other",
                  "norm_loads_in_flight", "scalar_loads_in_flight"}],
     "versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed}}
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import torch

from fusedopt.cli import machine, report
from fusedopt.inspection.code import Report
from fusedopt.operands import PLAIN
from fusedopt.optimizers import OPTIMIZERS
from fusedopt.options import MASTERS

HELP = "registers, spills and access widths of compiled kernels, without a GPU"
WORKERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--engine", choices=("triton", "cuda"), default="triton", help="default: %(default)s")
    parser.add_argument(
        "--arch", default="90", metavar="ARCH", help="compute capability such as 90, or gfx942; default: %(default)s"
    )
    parser.add_argument("--optimizer", action="append", metavar="NAME", help="repeatable; default: all")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=[codec.name for codec in PLAIN],
        help="of the Triton kernels; repeatable; default: fp32, bf16 and fp16. A CUDA kernel steps all",
    )
    parser.add_argument("--state-dtype", choices=("bfloat16", "8bit"), help="of the Triton kernels; default: none")
    masters = [master for master in MASTERS if master]
    parser.add_argument("--master", choices=masters, help="of the Triton kernels, for types that take it")


def run(args: argparse.Namespace) -> int:
    """Compile, print what came out, and write the JSON file if one was asked for."""
    names = _names(args.optimizer)
    kernels = _of_cuda(names, args) if args.engine == "cuda" else _of_triton(names, args)
    _print(kernels)
    report.write_json(args.json, {"kernels": [asdict(k) for k in kernels], "versions": machine.versions()})
    return 0


def _of_cuda(names: list[str], args: argparse.Namespace) -> list[Report]:
    from fusedopt.inspection import cuda

    for option in ("dtype", "state_dtype", "master"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise report.CommandError(f"--{name} is for the Triton engine; a CUDA kernel steps all types and storages")
    if reason := cuda.unavailable(args.arch):
        raise report.CommandError(reason)
    return cuda.inspect(
        {rule.name for name in names for rule in (OPTIMIZERS[name].rule, *OPTIMIZERS[name].rules)}, args.arch
    )


def _of_triton(names: list[str], args: argparse.Namespace) -> list[Report]:
    from fusedopt.inspection import triton

    if reason := triton.unavailable(args.arch):
        raise report.CommandError(reason)
    jobs = triton.jobs(names, args.dtype or ["fp32", "bf16", "fp16"], args.arch, (args.state_dtype, args.master))
    if not jobs:
        raise report.CommandError(f"no --dtype takes --state-dtype {args.state_dtype} and --master {args.master}")
    workers = min(torch.get_num_threads(), len(jobs), WORKERS)
    kernels: list[Report] = []
    with report.progress_bar() as bar, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        task = bar.add_task("", total=len(jobs))
        for done in pool.map(triton.inspect, jobs):
            kernels.append(done)
            bar.update(task, advance=1, description=done.name)
    return kernels


def _names(asked: list[str] | None) -> list[str]:
    known = {name.lower(): name for name in OPTIMIZERS}
    for name in asked or ():
        if name.lower() not in known:
            raise report.CommandError(f"no optimizer is called {name!r}; there are {', '.join(OPTIMIZERS)}")
    return [known[name.lower()] for name in asked or known]


def _print(kernels: list[Report]) -> None:
    headings = ("kernel", "registers", "spills", "loads", "stores", "all loads", "all stores", "in flight")
    table = report.table(
        f"Kernels for {kernels[0].arch}: accesses of 16 bytes + others, in full tiles and in all; loads in flight",
        *headings,
        numeric=headings[1:],
    )
    for k in kernels:
        table.add_row(
            k.name,
            str(k.registers),
            f"[bold red]{k.spills}[/]" if k.spills else "0",
            f"{k.loads_128} + {k.loads_other}",
            f"{k.stores_128} + {k.stores_other}",
            f"{k.kernel_loads_128} + {k.kernel_loads_other}",
            f"{k.kernel_stores_128} + {k.kernel_stores_other}",
            "" if k.norm_loads_in_flight is None else f"{k.norm_loads_in_flight} + {k.scalar_loads_in_flight}",
        )
    report.console.print(table)
