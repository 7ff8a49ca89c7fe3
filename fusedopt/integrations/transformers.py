"""The Trainer of transformers: ``max_grad_norm`` without a pass over the gradients."""

from __future__ import annotations

from typing import Any

from fusedopt.integrations.accelerate import fuse_clipping

__all__ = ["FusedClipping", "fuse_clipping"]


class FusedClipping:
    """A base of Trainers, before Trainer itself or one of trl's, that clip in the step of a fused optimizer.

    The ``grad_norm`` that is logged is the step's own. See ``fuse_clipping``, which does the same to the
    accelerator of a Trainer that exists.

    Example:
        >>> class MyTrainer(FusedClipping, Trainer): ...
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=5e-5)
        >>> MyTrainer(model, TrainingArguments(max_grad_norm=1.0), optimizers=(optimizer, None)).train()
    """

    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, as Trainer does."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        fuse_clipping(self.accelerator)
