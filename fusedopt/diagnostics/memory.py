"""How strongly momentum's memory changes the loss that is minimised, as one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fusedopt.diagnostics import recursions, show
from fusedopt.diagnostics.arguments import members, whole
from fusedopt.diagnostics.recursions import ADAM, LION, Recursion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECAYS = [1 - 10 ** (-i / 40) for i in range(4, 161)]  # of the plot: 0.2 ... 0.9999


def memory_coefficient(
    optimizer_or_betas: torch.optim.Optimizer | Sequence[float] | NDArray[np.float64],
    *,
    group: int | None = None,
    quiet: bool = False,
    plot: show.Plot = None,
) -> float:
    """How strongly momentum's memory changes the loss that is minimised, per unit of the learning rate.

    With ``tau = beta / (1 - beta)``, the mean age of what a moving average is of:

    * Adam, AdamW: ``tau2 - tau1``. The loss becomes ``L - lr (tau2 - tau1) |g|_1`` (for small eps, without decay):
      **positive is anti-regularisation**, it prefers large gradients. 990 for betas (0.9, 0.999), 10 for (0.9, 0.95).
    * NAdamW: ``tau2 - beta1 tau1``.
    * SGD: the factor of ``H g`` in M, ``(1-dampening)^2 momentum / (1-momentum)^3``; with ``nesterov``
      ``momentum^2 / (1-momentum)^3``. **Positive is regularisation**: the loss becomes ``L + lr/2 c |g|^2`` with this
      number times ``(1-momentum) / (1-dampening)`` as c. 0 without momentum.
    * Lion: ``beta1 / (1 - beta2)``, of what a smoothed sign regularises; **positive is regularisation**. The sign
      itself does not feel it but where a gradient changes sign.

    Storage, clipping and ``average=EMA(...)`` are not in it: gradients are taken as the step sees them.

    Args:
        optimizer_or_betas: An SGD, Adam, AdamW, NAdamW or Lion of fusedopt, an SGD, Adam or AdamW of torch.optim; or
            a pair of Adam's betas.
        group: Which param group; None where all have the same.
        quiet: Print no table.
        plot: A PNG file for the coefficient over the decay rate that matters most.

    Returns:
        The coefficient, in steps.

    Raises:
        TypeError: If the derivation is not of this optimizer, or an argument is of another kind.
        ValueError: If it is not of an option (amsgrad, maximize, Lookahead, noise, cautious decay, rescale), a beta is
            outside [0, 1), param groups differ, or there is no such group.

    Example:
        >>> diagnostics.memory_coefficient((0.9, 0.999))

    Reference:
        Cattaneo and Shigida, NeurIPS 2025, arXiv 2502.02132; checked by ``examples/memory_order.py``.
    """
    show.check_plot(plot)
    found = _recursion(optimizer_or_betas, group)
    coefficient = found.coefficient()
    if not quiet:
        effect = _effect(found.kind, coefficient)
        lags = (f"{found.first:.6g}", f"{found.second:.6g}" if found.kind == ADAM else "", f"{coefficient:.6g}", effect)
        columns = ("recursion", "lag of the first moment", "of the second", "coefficient", "effect")
        show.print_table("Memory of momentum, in steps", columns, [(found.kind, *lags)])
    show.draw(
        plot,
        f"{found.kind}: coefficient {coefficient:.4g}",
        "1 - decay rate",
        "coefficient",
        _curve(optimizer_or_betas, group or 0),
    )
    return coefficient


def _effect(kind: str, coefficient: float) -> str:
    """What memory does to the loss, in a word."""
    if coefficient == 0:
        return "nothing"
    if kind == LION:
        return "nothing; of a smoothed sign: regularises"
    return "anti-regularises" if (coefficient > 0) == (kind == ADAM) else "regularises"


def _recursion(asked: object, group: int | None) -> Recursion:
    """The recursion of a pair of betas, of a group, or of all groups if they are alike."""
    if not isinstance(asked, torch.optim.Optimizer):
        if group is not None:
            raise ValueError(f"group is {group!r}, and a pair of betas has no groups")
        if members(asked) is None:
            raise TypeError(f"optimizer_or_betas is {type(asked).__name__}; it must be an optimizer or a pair of betas")
        return recursions.of_betas(asked)
    found = recursions.of_optimizer(asked)
    if group is not None:
        if (index := whole("group", group, 0)) >= len(found):
            raise ValueError(f"group is {group!r}; the optimizer has groups 0 to {len(found) - 1}")
        return found[index]
    values = [r.coefficient() for r in found]
    if len(set(values)) > 1:
        raise ValueError(f"groups have coefficients {', '.join(f'{v:.6g}' for v in values)}; choose one with group=")
    return found[0]


def _curve(asked: object, group: int) -> Callable[[Axes], None]:
    """Draws the coefficient over momentum or the last beta, the others as they are, and where it stands."""
    kind, own = (type(asked), asked.param_groups[group]) if isinstance(asked, torch.optim.Optimizer) else (None, None)

    def at(decay: float | None) -> tuple[float, float]:
        if kind is None or own is None:
            first, second = cast("tuple[float, float]", asked)
            return float(second), recursions.of_betas((first, second if decay is None else decay)).coefficient()
        changed = dict(own)
        if "momentum" in own:
            changed["momentum"] = own["momentum"] if decay is None else decay
        else:
            changed["betas"] = (own["betas"][0], own["betas"][1] if decay is None else decay)
        rate = changed["momentum"] if "momentum" in own else changed["betas"][1]
        return float(rate), recursions.of_group(kind, changed, "").coefficient()

    def fill(axes: Axes) -> None:
        axes.plot([1 - decay for decay in DECAYS], [at(decay)[1] for decay in DECAYS], color=show.BLUE)
        rate, value = at(None)
        axes.plot([1 - rate], [value], "o", color=show.ORANGE, label=f"{value:.4g}")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1.0)

    return fill
