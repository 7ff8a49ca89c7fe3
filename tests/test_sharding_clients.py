"""FSDP, ZeRO, GradScaler, checkpoints: what shards models, with our optimizers in the place of torch's."""

import copy
import math
import warnings

import pytest
import torch
from helpers import close
from sharding import whole
from torch import nn

import fusedopt

pytestmark = pytest.mark.xdist_group("ranks")


def model():
    """Of sizes that no number of ranks divides, and a layer of which most ranks have nothing."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 1))


def batches(count=5):
    torch.manual_seed(4)
    return [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(count)]


def part_of(batch):
    """A rank's part of a batch."""
    from torch.distributed import get_rank, get_world_size

    return [t.chunk(get_world_size())[get_rank()] for t in batch]


def loss(module, batch):
    x, y = batch
    return (module(x).float() - y).square().mean()


def fully_sharded(**options):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    module = model()
    options.setdefault("mesh", init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(module, **options)


def optimizers(module, other, name, **options):
    """Ours on a module, torch's on another; Lion's is ours in eager."""
    if name == "SGD":
        options["momentum"] = 0.9
    if name == "Lion":
        b = fusedopt.Lion(other.parameters(), **options, engine="eager")
    else:  # torch's fused SGD takes no DTensors
        b = getattr(torch.optim, name)(other.parameters(), **options, fused=name != "SGD", foreach=name == "SGD")
    return lambda **ours: getattr(fusedopt, name)(module.parameters(), **options, **ours), b


def train_fsdp2(name, clip, hybrid):
    from torch.distributed.tensor import init_device_mesh

    mesh = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))} if hybrid else {}
    ours, sharded, alone = fully_sharded(**mesh), fully_sharded(**mesh), model()
    build, b = optimizers(ours, sharded, name, lr=0.02, weight_decay=0.1)
    a, c = build(max_grad_norm=clip), optimizers(ours, alone, name, lr=0.02, weight_decay=0.1)[1]
    for batch in batches():
        for module, optimizer, part in ((ours, a, part_of(batch)), (sharded, b, part_of(batch)), (alone, c, batch)):
            optimizer.zero_grad()
            loss(module, part).backward()
            if clip and optimizer is not a:
                norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
                norm = whole(norm)
            versions = [p._version for p in module.parameters()]
            optimizer.step()
            moved = [p._version > was for p, was in zip(module.parameters(), versions, strict=True)]
            assert all(moved) or not isinstance(optimizer, fusedopt.FusedOptimizer)  # torch's fused ones forget it
        if clip:
            close(a.grad_norm, norm, 1e-5)
    for p, q, r in zip(*(m.parameters() for m in (ours, sharded, alone)), strict=True):
        close(whole(p), whole(q), 1e-5)
        close(whole(p), whole(r), 1e-4)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize(("name", "world", "hybrid"), [("AdamW", 2, False), ("Lion", 2, False), ("SGD", 4, True)])
def test_fsdp2(ranks, name, world, hybrid, clip):
    ranks.run(world, train_fsdp2, name, clip, hybrid)


def train_tensor_parallel():
    """Tensor parallel layers, sharded by FSDP2 as well: strided shards, and shards in two dimensions."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    alone = copy.deepcopy(ours)
    parallelize_module(ours, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(ours, mesh=mesh["data"])
    a = fusedopt.AdamW(ours.parameters(), lr=0.02, max_grad_norm=0.1)
    b = torch.optim.AdamW(alone.parameters(), lr=0.02)
    for x, _ in batches():
        for module, optimizer, part in ((ours, a, x.chunk(2)[mesh.get_local_rank("data")]), (alone, b, x)):
            optimizer.zero_grad()
            module(part).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        a.step(), b.step()
        close(a.grad_norm, norm, 1e-5)
    assert len({type(x) for p in ours.parameters() for x in p.placements}) > 1
    for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
        close(whole(p), q.detach(), 1e-4)


def test_fsdp2_of_tensor_parallel_layers(ranks):
    ranks.run(4, train_tensor_parallel)


def train_mixed_precision():
    """Parameters in fp32, forwards and backwards in bf16, gradients reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    ours, theirs = fully_sharded(**policy), fully_sharded(**policy)
    a = fusedopt.AdamW(ours.parameters(), lr=0.02, max_grad_norm=0.5)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.02, fused=True)
    for batch in batches():
        for module, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            x, y = part_of(batch)
            loss(module, (x.bfloat16(), y)).backward()
        norm = whole(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        a.step(), b.step()
        close(a.grad_norm, norm, 1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(whole(p), whole(q), 1e-5)
    assert all(a.state[p]["exp_avg"].dtype == torch.float32 for p in ours.parameters())


def test_mixed_precision(ranks):
    ranks.run(2, train_mixed_precision)


def train_fsdp1(clip, original):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    warnings.simplefilter("ignore")
    options = {"device_id": torch.device("cpu"), "use_orig_params": original}
    ours, alone = FSDP(model(), **options), model()
    a = fusedopt.AdamW(ours.parameters(), lr=0.02, max_grad_norm=clip, process_group=ours.process_group)
    b = torch.optim.AdamW(alone.parameters(), lr=0.02)
    for batch in batches():
        for module, optimizer, part in ((ours, a, part_of(batch)), (alone, b, batch)):
            optimizer.zero_grad()
            loss(module, part).backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), clip)
        a.step(), b.step()
        close(a.grad_norm, norm, 1e-5)
    with FSDP.summon_full_params(ours):
        for p, q in zip(ours.parameters(), alone.parameters(), strict=original):
            if original:
                close(p.detach(), q.detach(), 1e-4)
        if not original:
            flat = torch.cat([p.detach().flatten() for p in ours.parameters()])
            close(flat[: sum(p.numel() for p in alone.parameters())], nn.utils.parameters_to_vector(alone.parameters()))
    for extra in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        optimizer = fusedopt.AdamW(ours.parameters(), **extra)
        with pytest.raises(RuntimeError, match="sharded among ranks .*process_group=model.process_group"):
            optimizer.step()
        assert not optimizer.state


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_with_its_process_group(ranks, original):
    ranks.run(2, train_fsdp1, 0.3, original)


def train_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ours, alone = model(), model()
    a = ZeroRedundancyOptimizer(
        ours.parameters(),
        optimizer_class=fusedopt.AdamW,
        lr=0.02,
        max_grad_norm=0.3,
        process_group=torch.distributed.group.WORLD,
    )
    b = torch.optim.AdamW(alone.parameters(), lr=0.02)
    a.optim.process_group = torch.distributed.group.WORLD  # ZeRO's own argument of that name does not reach it
    for batch in batches():
        for module, optimizer in ((ours, a), (alone, b)):
            optimizer.zero_grad()
            loss(module, batch).backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.3)
        a.step(), b.step()
        close(a.optim.grad_norm, norm, 1e-5)
    for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-5)


def test_zero_with_its_process_group(ranks):
    ranks.run(2, train_zero)


def scale_together(kind, sharded_scaler, unscales):
    """An infinity on one rank: all skip, and all scale back."""
    from torch.distributed import get_rank
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(0)
    if kind == "fsdp2":
        module = fully_sharded()
        optimizer = fusedopt.AdamW(module.parameters(), lr=0.02, max_grad_norm=1.0)
    else:  # as the stages of a pipeline: each rank has parameters of its own
        module = model()
        optimizer = fusedopt.AdamW(module.parameters(), lr=0.02, process_group=torch.distributed.group.WORLD)
    scaler = (ShardedGradScaler if sharded_scaler else torch.amp.GradScaler)("cpu", init_scale=256.0)
    for t, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(loss(module, part_of(batch))).backward()
        before = [whole(p).clone() for p in module.parameters()]
        if t in (0, 2) and get_rank() == 1:
            g = next(p.grad for p in module.parameters() if p.grad.numel())
            getattr(g, "_local_tensor", g).view(-1)[0] = math.inf
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(whole(p), q) for p, q in zip(module.parameters(), before, strict=True)]
        assert all(same) if t in (0, 2) else not all(same)
    assert scaler.get_scale() == 64 and optimizer.skipped_steps == 2


@pytest.mark.parametrize("sharded_scaler", [False, True])
@pytest.mark.parametrize("kind", ["fsdp2", "stages"])
@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scalers_decide_together(ranks, kind, sharded_scaler, unscales):
    ranks.run(2, scale_together, kind, sharded_scaler, unscales)


def save(folder, name, ours):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    module = fully_sharded()
    optimizer = getattr(fusedopt if ours else torch.optim, name)(module.parameters(), lr=0.02, weight_decay=0.1)
    for batch in batches(3):
        optimizer.zero_grad()
        loss(module, part_of(batch)).backward()
        optimizer.step()
    state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load(folder, name, ours):
    """What was saved on other ranks, by ours or torch's, goes on as a run of one process does that never stopped."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    module, alone = fully_sharded(), model()
    optimizer = getattr(fusedopt if ours else torch.optim, name)(module.parameters(), lr=0.5, weight_decay=0.3)
    state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
    # torch's NAdam has no `fused` to have saved
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=name == "NAdam"))
    module.load_state_dict(state["model"])
    set_optimizer_state_dict(module, optimizer, state["optimizer"])
    b = getattr(torch.optim, name)(alone.parameters(), lr=0.02, weight_decay=0.1)
    for t, batch in enumerate(batches(5)):
        b.zero_grad()
        loss(alone, batch).backward()
        b.step()
        if t >= 3:
            optimizer.zero_grad()
            loss(module, part_of(batch)).backward()
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.02
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        close(whole(p), q.detach(), 1e-4)
        for key, value in b.state[q].items():
            close(whole(optimizer.state[p][key]), value, 1e-4)


@pytest.mark.parametrize(("saved_by_us", "loaded_by_us"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_checkpoints_of_other_numbers_of_ranks(ranks, tmp_path, name, saved_by_us, loaded_by_us):
    ranks.run(2, save, str(tmp_path), name, saved_by_us)
    for world in (1, 4):
        ranks.run(world, load, str(tmp_path), name, loaded_by_us)


def state_dicts(full, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat)
    ours = fully_sharded()
    a = fusedopt.AdamW(ours.parameters(), lr=0.02, max_grad_norm=1.0)
    for batch in batches(2):
        a.zero_grad()
        loss(ours, part_of(batch)).backward()
        a.step()
    a.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(ours, a, options=options))
    other = fully_sharded()
    other.load_state_dict(ours.state_dict())
    b = fusedopt.AdamW(other.parameters(), lr=0.5, max_grad_norm=1.0)
    set_optimizer_state_dict(other, b, saved, options=options)
    for batch in batches(2):
        for module, optimizer in ((ours, a), (other, b)):
            optimizer.zero_grad()
            loss(module, part_of(batch)).backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))
        for key, value in a.state[p].items():
            assert type(value) is type(b.state[q][key]) and torch.equal(whole(value), whole(b.state[q][key]))


@pytest.mark.parametrize(("full", "flat"), [(False, False), (False, True), (True, False)])
def test_state_dicts_of_all_forms(ranks, full, flat):
    ranks.run(2, state_dicts, full, flat)


def release_in_backward():
    ours, sharded = fully_sharded(), fully_sharded()
    a = fusedopt.AdamW(ours.parameters(), lr=0.02)
    b = torch.optim.AdamW(sharded.parameters(), lr=0.02, fused=True)
    handle = fusedopt.step_in_backward(a)
    for batch in batches():
        for module, optimizer in ((ours, a), (sharded, b)):
            loss(module, part_of(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    handle.remove()
    for p, q in zip(ours.parameters(), sharded.parameters(), strict=True):
        close(whole(p), whole(q), 1e-5)
        assert a.state[p]["step"] == 5


def test_stepped_in_backward_under_fsdp2(ranks):
    ranks.run(2, release_in_backward)
