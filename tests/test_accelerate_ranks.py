"""accelerate on several ranks: clipping in the step, by the norm of the whole."""

import os

import pytest
import torch
from helpers import close
from sharding import whole
from test_sharding_clients import batches, loss, model, part_of

import fusedopt

pytestmark = pytest.mark.xdist_group("ranks")


def accelerated(kind, make, fuses, clip):
    """Losses, norms and parameters of a few steps of accelerate's loop."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.distributed import get_rank, get_world_size

    from fusedopt.integrations.accelerate import fuse_clipping

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    rank, world = str(get_rank()), str(get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    if kind == "fsdp2":  # which accelerate only begins by itself where there are GPUs
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20, cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        assert accelerator.is_fsdp2
    if fuses:
        fuse_clipping(accelerator)
        torch.nn.utils.get_total_norm = None  # nobody makes a pass over the gradients
    module = model()
    module, optimizer = accelerator.prepare(module, make(module.parameters()))
    found = []
    for batch in batches():
        value = loss(module, part_of(batch))
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(torch.stack([value.detach(), whole(norm)]))
    return torch.stack(found), [whole(p) for p in module.parameters()]


def train_accelerated(kind):
    total_norm = torch.nn.utils.get_total_norm
    try:
        ours = accelerated(kind, lambda ps: fusedopt.AdamW(ps, lr=0.02), True, 0.3)
    finally:
        torch.nn.utils.get_total_norm = total_norm
    theirs = accelerated(kind, lambda ps: torch.optim.AdamW(ps, lr=0.02, fused=True), False, 0.3)
    close(ours[0], theirs[0], 1e-5)
    for p, q in zip(ours[1], theirs[1], strict=True):
        close(p, q, 1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_accelerate_clips_the_norm_of_the_whole(ranks, kind):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fusedopt[clients]'")
    ranks.run(2, train_accelerated, kind)
