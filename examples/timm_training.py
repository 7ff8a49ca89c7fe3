"""Trains a small vision transformer of timm on random pictures, with layer decay and an optimizer made by its name.

Run ``python examples/timm_training.py``; seconds on two cores. It downloads nothing.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional

import fusedopt.integrations.timm

CLASSES = 4


def main(steps: int, opt: str) -> None:
    """Learn pictures by heart, and say how it went."""
    fusedopt.integrations.timm.register()
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=CLASSES
    )
    optimizer = create_optimizer_v2(
        model, opt, lr=1e-3, weight_decay=0.05, layer_decay=0.75, max_grad_norm=1.0, average=fusedopt.EMA(0.95)
    )
    pictures, classes = torch.randn(32, 3, 32, 32), torch.arange(32) % CLASSES
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(pictures), classes).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), optimizer.averaged():
        loss = functional.cross_entropy(model(pictures), classes)
    print(f"{len(optimizer.param_groups)} groups, {steps} steps of {opt}, loss of the averaged weights {loss:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--opt", default="foadamw", help="a name that timm knows")
    main(*vars(parser.parse_args()).values())
