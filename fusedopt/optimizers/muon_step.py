"""What a step of Muon runs on: its matrix function between two launches, see two_launches.py.

The first launch steps what AdamW has, and writes what the function is of, momentum or Nesterov's, into one stack for
each shape. The second steps the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedopt import checks, storage
from fusedopt.aliases import Group
from fusedopt.context import Context
from fusedopt.newton_schulz import Workspace
from fusedopt.optimizers.muon_stacks import Stacks, is_matrix, matrix_of
from fusedopt.optimizers.two_launches import Launches

ADAMW, MUON = "adamw", "muon"


class MuonLaunches(Launches):
    """Steps a Muon.

    Args:
        whole: The optimizer, brought up to date before every step.
        workspace: Of the matrix function; others may share it that do not step at the same time.
    """

    of_function: str = MUON
    kept: tuple[str, ...] = ("momentum_buffer", storage.scale_of("momentum_buffer"))
    made_of: tuple[str, ...] = ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "ns_dtype")

    def __init__(self, whole: Context, workspace: Workspace) -> None:
        super().__init__(whole)
        self._workspace = workspace

    def function(self, numbered: Sequence[tuple[int, Tensor, Group]]) -> Stacks:
        """Newton-Schulz's iteration of stacks; see ``Launches.function``."""
        labels = checks.labels(self._whole.param_groups)
        for number, p, _ in numbered:
            if not is_matrix(p):
                raise ValueError(
                    f"{labels[number]} is no real matrix, and its group says algorithm='muon'; what flattens or swaps "
                    "parameters, as ZeRO does, is not for Muon: shard with fully_shard"
                )
        return Stacks([matrix_of(*one) for one in numbered], self._workspace)
