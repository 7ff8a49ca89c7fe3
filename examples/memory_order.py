"""Measures of what order the memory term of momentum is, for SGD with momentum, NAG, AdamW, NAdamW and Lion-K.

A smooth function in float64 is minimised with steps h, h/2, h/4, ... over the same time. First the momentum is burnt
in; from there on the optimizer is compared with the iteration without memory, ``p <- p - h F``, whose error must be of
order h, and with ``p <- p - h (F + h M)`` of ``fusedopt.diagnostics.memory_correction``, whose error must be of order
h^2. Lion-K is Lion with a smoothed sign, in a textbook loop: M of the sign itself vanishes.

Run ``python examples/memory_order.py``; it prints a table, and writes ``memory_order.json`` and ``memory_order.png``.
Some seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.diagnostics import memory_correction

STEP, STEPS = 1 / 512, 64  # the largest h, and how many of it are compared
BURN_IN = 450  # steps, after which a beta of 0.95 has left 1e-10
SMOOTHING = 0.3  # Lion-K's, where gradients are 0.2 to 1
BETAS = (0.9, 0.95)


def loss(p: Tensor) -> Tensor:
    """A quartic whose parts are coupled, and whose gradients keep their signs where p is positive."""
    near = p * p.roll(1)
    return 0.02 * (p**2).sum() + 0.004 * (near**2).sum() + 0.03 * torch.log1p(p.sum() ** 2)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: What it is called.
        make: The optimizer of a parameter, with an lr.
        smoothing: Lion-K's.
        slower: By how much its steps are smaller: those of momentum without dampening go ten times as far.
    """

    name: str
    make: Callable[[nn.Parameter, float], fusedopt.FusedOptimizer]
    smoothing: float = 0.0
    slower: float = 1.0


def _case(name: str, kind: Any, smoothing: float = 0.0, slower: float = 1.0, **options: Any) -> Case:
    return Case(name, lambda p, lr: kind([p], lr=lr, **options), smoothing, slower)


DECOUPLED = {"weight_decay": 0.05, "decoupled_weight_decay": True}
CASES = [
    _case("SGD, momentum 0.9", fusedopt.SGD, slower=10, momentum=0.9, weight_decay=0.05),
    _case("SGD, momentum and dampening 0.9", fusedopt.SGD, momentum=0.9, dampening=0.9),
    _case("NAG, momentum 0.9", fusedopt.SGD, slower=10, nesterov=True, momentum=0.9, **DECOUPLED),
    _case("Adam, L2, betas (0.9, 0.95)", fusedopt.Adam, betas=BETAS, eps=0.05, weight_decay=0.1),
    _case("AdamW, betas (0.9, 0.95)", fusedopt.AdamW, betas=BETAS, eps=0.05, weight_decay=0.1),
    _case("NAdamW, betas (0.9, 0.95)", fusedopt.NAdamW, betas=BETAS, eps=0.05, weight_decay=0.1),
    _case("Lion-K, betas (0.9, 0.95)", fusedopt.Lion, SMOOTHING, betas=BETAS, weight_decay=0.1),
]
LION = _case("Lion, betas (0.9, 0.95)", fusedopt.Lion, betas=BETAS, weight_decay=0.1)


def start(case: Case, h: float) -> nn.Parameter:
    """Where burning in begins: so far up the way of F that it ends at about the same point for all h."""
    p = nn.Parameter(torch.linspace(2.0, 3.5, 5, dtype=torch.float64))
    optimizer = case.make(p, h)
    for _ in range(BURN_IN // 10):
        found = memory_correction(optimizer, loss, p, smoothing=case.smoothing, quiet=True)
        with torch.no_grad():
            p += 10 * h * found.force[0]
    return p


def with_memory(case: Case, p: nn.Parameter, h: float) -> Callable[[], None]:
    """A step of the optimizer itself, or of Lion-K's loop."""
    optimizer = case.make(p, h)
    if not case.smoothing:

        def step() -> None:
            (p.grad,) = torch.autograd.grad(loss(p), p)
            optimizer.step()

        return step
    group, m = optimizer.param_groups[0], torch.zeros_like(p, requires_grad=False)
    (beta1, beta2), decay = group["betas"], group["weight_decay"]

    def lion_k() -> None:
        (g,) = torch.autograd.grad(loss(p), p)
        with torch.no_grad():
            c = beta1 * m + (1 - beta1) * g
            p.mul_(1 - h * decay).sub_(h * c / (c * c + case.smoothing**2).sqrt())
            m.mul_(beta2).add_((1 - beta2) * g)

    return lion_k


def without_memory(case: Case, start_at: Tensor, h: float, steps: int, is_corrected: bool) -> Tensor:
    """Where the memoryless iteration ends."""
    p = nn.Parameter(start_at.clone())
    optimizer = case.make(p, h)
    for _ in range(steps):
        found = memory_correction(optimizer, loss, p, smoothing=case.smoothing, quiet=True)
        with torch.no_grad():
            p -= h * (found.force[0] + (found.correction[0] if is_corrected else 0.0))
    return p.detach()


def errors(case: Case, h: float, steps: int) -> tuple[float, float]:
    """Largest errors of the memoryless iterations at the end: with F alone, and with F + h M."""
    p = start(case, h)
    step = with_memory(case, p, h)
    for _ in range(BURN_IN):
        step()
    burnt_in = p.detach().clone()
    for _ in range(steps):
        step()
    assert (p > 0).all(), "a gradient has changed its sign"
    ends = [without_memory(case, burnt_in, h, steps, is_corrected) for is_corrected in (False, True)]
    plain, corrected = ((p.detach() - end).abs().max().item() for end in ends)
    return plain, corrected


def measure(case: Case, halvings: int) -> dict[str, Any]:
    """Errors for each h, and the orders between the last two."""
    sizes = [STEP / case.slower / 2**i for i in range(halvings + 1)]
    plain, corrected = zip(*(errors(case, h, STEPS * 2**i) for i, h in enumerate(sizes)), strict=True)
    found: dict[str, Any] = {"method": case.name, "h": sizes, "F": list(plain), "F + h M": list(corrected)}
    for key in ("F", "F + h M"):
        *_, before, last = found[key]
        found[f"order of {key}"] = math.log2(before / last) if last else None
    return found


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Errors over h: F alone dashed, with h M solid."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for i, row in enumerate(rows):
        axes.loglog(row["h"], row["F"], "--", color=f"C{i}", marker=".")
        axes.loglog(row["h"], row["F + h M"], "-", color=f"C{i}", marker=".", label=row["method"])
    axes.set(xlabel="h, the learning rate", ylabel="largest error at the end")
    axes.set_title("Dashed: steps with F alone, order 1. Solid: with F + h M, order 2", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halvings", type=int, default=3, help="of the step; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("memory_order"), help="without its suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, args.halvings) for case in CASES]
    print("| method | h | error with F | with F + h M | order with F | with F + h M |\n|---|---|---|---|---|---|")
    for row in rows:
        orders = f"{row['order of F']:.2f} | {row['order of F + h M']:.2f}"
        print(f"| {row['method']} | {row['h'][-1]:.1e} | {row['F'][-1]:.1e} | {row['F + h M'][-1]:.1e} | {orders} |")
    plain, corrected = errors(LION, STEP, STEPS)
    print(f"\nfusedopt.Lion, h = {STEP:g}: error {plain:.1e} with F alone, {corrected:.1e} with F + h M, for M is 0")
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(args.output.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
