"""Low-bit states and masters of parameters that are sharded among ranks: the same bits as on one process."""

import pytest
import torch
from conftest import AVAILABLE
from helpers import bits
from sharding import mesh_of, placed, whole
from torch import nn

import fusedopt
from fusedopt import storage

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(64, 128), (17, 300), (8192,), (4099,), (8, 1024), (30,)]
STORAGES = [("8bit", "split"), (torch.bfloat16, "stochastic")]
ENGINES = [name for name in AVAILABLE if name in ("cpu", "cuda")]


def places(world):
    """Rows on ranks; of one dimension, cut between blocks and inside of one; columns, in blocks; whole."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(world)
    return [(mesh, [x]) for x in (Shard(0), Shard(0), Shard(0), Shard(0), Shard(1), Replicate())]


def optimizers(world, engine, state_dtype, master):
    torch.manual_seed(3)
    theirs = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    ours = [nn.Parameter(placed(p.detach(), place)) for p, place in zip(theirs, places(world), strict=True)]
    options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": state_dtype, "master": master, "engine": engine}
    return ours, fusedopt.AdamW(ours, **options), theirs, fusedopt.AdamW(theirs, **options)


def step(world, ours, a, theirs, b):
    for p, q, place in zip(ours, theirs, places(world), strict=True):
        q.grad = torch.randn(q.shape).bfloat16()
        p.grad = placed(q.grad, place)
    a.step()
    b.step()


def compare(world, engine, state_dtype, master):
    ours, a, theirs, b = optimizers(world, engine, state_dtype, master)
    for _ in range(3):
        step(world, ours, a, theirs, b)
    for p, q in zip(ours, theirs, strict=True):
        state, other = a.state[p], b.state[q]
        is_cut = state_dtype == "8bit" and not storage.fits_blocks(p) and storage.fits_blocks(q)
        if is_cut:  # its states are wider than those of the whole
            assert q.shape == (4099,) and state["exp_avg"].dtype == torch.float32
            continue
        assert torch.equal(whole(p), q.detach())
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert value.dtype == other[key].dtype and torch.equal(bits(whole(value)), bits(other[key])), key
            if value.dim():
                assert type(value) is type(p.data) and value.placements == p.placements
        assert torch.equal(whole(fusedopt.master_weights(a)[p]), fusedopt.master_weights(b)[q])


@pytest.mark.parametrize("state_dtype, master", STORAGES, ids=str)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("of", ENGINES)
def test_shards_have_the_bits_of_the_whole(ranks, of, world, state_dtype, master):
    ranks.run(world, compare, world, of, state_dtype, master)


def convert(world):
    ours, a, theirs, b = optimizers(world, "cpu", None, None)
    step(world, ours, a, theirs, b)
    for optimizer in (a, b):
        fusedopt.convert_state(optimizer, state_dtype="8bit", master="split")
    step(world, ours, a, theirs, b)
    for p, q in zip(ours, theirs, strict=True):
        assert q.shape == (4099,) or torch.equal(whole(p), q.detach())
    saved = a.state_dict(dequantized=True)
    assert all(v.dtype == torch.float32 for state in saved["state"].values() for v in state.values())


def test_shards_convert(ranks):
    ranks.run(2, convert, 2)


def save(world, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = sharded(world)
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)


def sharded(world, steps=2):
    """A model whose only parameter is sharded by rows, stepped."""
    (mesh, place), *_ = places(world)
    torch.manual_seed(5)
    model = nn.Linear(128, 64, bias=False)
    model.weight = nn.Parameter(placed(model.weight.detach().bfloat16(), (mesh, place)))
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, state_dtype="8bit", master="split")
    for _ in range(steps):
        model.weight.grad = placed(torch.randn(64, 128).bfloat16(), (mesh, place))
        optimizer.step()
    return model, optimizer


def load(world, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = sharded(world, steps=1)
    _, expected = sharded(world)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state)
    (found,), (wanted,) = optimizer.state.values(), expected.state.values()
    assert found["exp_avg"].dtype == torch.uint8
    for key, value in wanted.items():
        assert torch.equal(bits(whole(found[key])), bits(whole(value))), key


@pytest.mark.parametrize("before, after", [(2, 4), (4, 2)])
def test_codes_and_scales_reshard(ranks, tmp_path, before, after):
    ranks.run(before, save, before, tmp_path)
    ranks.run(after, load, after, tmp_path)
