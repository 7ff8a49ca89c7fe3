"""Trains a small GPT-2 on the text of Python's own documentation with transformers' Trainer, and clips in the step.

Run ``python examples/transformers_trainer.py``; a minute at most on two cores. It downloads nothing.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fusedopt
from fusedopt.cli.gpt import Text
from fusedopt.integrations.transformers import FusedClipping

CONTEXT = 64


class FusedTrainer(FusedClipping, Trainer):
    """Whose ``max_grad_norm`` costs no pass over the gradients."""


def rows(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Stretches of a text, each also what is to be predicted: the model shifts it."""
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)]


def main(steps: int) -> None:
    """Train, evaluate, and say how it went."""
    text = Text()
    shape = GPT2Config(vocab_size=len(text.characters), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(shape)
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, max_grad_norm=1.0, logging_steps=20,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, use_cpu=not torch.cuda.is_available(), report_to=[],
            save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = FusedTrainer(
            model,
            arguments,
            train_dataset=rows(text.train),
            eval_dataset=rows(text.held_out),
            optimizers=(optimizer, None),
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
