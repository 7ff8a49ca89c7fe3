"""Trains a character GPT on the text of Python's own documentation with Lightning in bf16-mixed; the step clips.

Run ``python examples/lightning_module.py``; a minute at most on two cores. It downloads nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import fusedopt
from fusedopt.cli.gpt import GPT, Shape, Text
from fusedopt.integrations.lightning import FusedClipping

SHAPE = Shape(layers=2, width=64)


class CharacterModel(FusedClipping, LightningModule):
    """Whose Trainer's ``gradient_clip_val`` costs no pass over the gradients, in any precision."""

    def __init__(self, characters: int, steps: int) -> None:
        super().__init__()
        self.model, self.steps = GPT(characters, SHAPE), steps

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """Loss of stretches, each one character longer than the context."""
        return self.model.loss(batch[:, :-1], batch[:, 1:])

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        """The same on unseen text."""
        self.log("val_loss", self.model.loss(batch[:, :-1], batch[:, 1:]), prog_bar=True)

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the norm that the step has measured: no copy, and no pass."""
        self.log("grad_norm", self.optimizers().grad_norm)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and a cosine that moves at every step."""
        optimizer = fusedopt.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(numbers: torch.Tensor, **options: Any) -> DataLoader[torch.Tensor]:
    """Stretches of a text."""
    return DataLoader(list(numbers.unfold(0, SHAPE.context + 1, SHAPE.context)), batch_size=16, **options)  # type: ignore


def main(steps: int) -> None:
    """Train, evaluate, and say how it went."""
    text = Text()
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps, gradient_clip_val=1.0, precision="bf16-mixed", accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    model = CharacterModel(len(text.characters), steps)
    trainer.fit(model, batches(text.train, shuffle=True))
    trainer.validate(model, batches(text.held_out[:20_000]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
