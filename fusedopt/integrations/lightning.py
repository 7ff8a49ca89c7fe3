"""Lightning: ``gradient_clip_val`` without a pass over the gradients, in every precision."""

from __future__ import annotations

from typing import Any

from fusedopt.integrations import unwrapped


class FusedClipping:
    """A base of LightningModules, before LightningModule itself, whose fused optimizers clip in their step.

    ``Trainer(gradient_clip_val=..., gradient_clip_algorithm="norm")`` then works with any precision and strategy that
    steps the module's own optimizers. What is clipped by value, and what other optimizers step, Lightning clips as
    before. In manual optimization call ``self.configure_gradient_clipping(optimizer, max_norm)`` before ``step()``.

    Example:
        >>> class MyModule(FusedClipping, LightningModule): ...
    """

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as the Trainer was told to; None and 0 stand for no clipping.

        Args:
            optimizer: That is going to step.
            gradient_clip_val: The largest norm.
            gradient_clip_algorithm: "norm" or "value".
        """
        fused = unwrapped(optimizer)
        by_value = str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)).lower() == "value"
        if fused is None or by_value:
            super().configure_gradient_clipping(  # type: ignore[misc]
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            fused.clip_next_step(gradient_clip_val)
