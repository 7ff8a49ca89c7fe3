"""Trains a character GPT that FSDP2 shards over ranks, clips by the norm of the whole, saves, and resumes.

Run ``torchrun --nproc-per-node 2 examples/fsdp2.py``; a minute at most on two cores. It downloads nothing.

Every rank steps its shards of all parameters in one launch; what ranks tell one another for it is one number, the
squares of the gradients' norm.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fusedopt
from fusedopt.cli.gpt import GPT, Shape, Text, batch

BATCH = 8


def sharded(characters: int) -> tuple[GPT, fusedopt.AdamW]:
    """A model whose blocks are sharded one by one, and its optimizer: made after the sharding."""
    torch.manual_seed(0)
    model = GPT(characters, Shape(layers=2, width=64))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, fusedopt.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)


def train(model: GPT, optimizer: fusedopt.AdamW, text: Text, steps: range) -> torch.Tensor:
    """The mean loss of all ranks in the last step. Each step's text depends on its number and the rank alone."""
    loss = torch.zeros(())
    for t in steps:
        generator = torch.Generator().manual_seed(1000 * distributed.get_rank() + t)
        x, y = batch(text.train, BATCH, model.context, generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        if distributed.get_rank() == 0 and t % 10 == 0:
            print(f"step {t}: loss {loss:.4f}, norm {optimizer.grad_norm:.4f}", flush=True)
    loss = loss.detach() / distributed.get_world_size()
    distributed.all_reduce(loss)
    return loss


def main(steps: int) -> None:
    """Train with a save in the middle; go on from it with a second model; both must come to the same."""
    distributed.init_process_group("gloo")
    text = Text()
    folder = [TemporaryDirectory() if distributed.get_rank() == 0 else None]
    where = [folder[0].name if folder[0] else ""]
    distributed.broadcast_object_list(where)

    model, optimizer = sharded(len(text.characters))
    train(model, optimizer, text, range(steps // 2))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=where[0])
    straight = train(model, optimizer, text, range(steps // 2, steps))

    model, optimizer = sharded(len(text.characters))
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=where[0])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    resumed = train(model, optimizer, text, range(steps // 2, steps))
    if distributed.get_rank() == 0:
        print(f"loss {straight:.6f} straight on, {resumed:.6f} resumed")
    assert torch.equal(straight, resumed)
    distributed.barrier()
    if folder[0]:
        folder[0].cleanup()
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
