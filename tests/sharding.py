"""Tensors that ranks share: for functions that tests run on several ranks, each of which calls them."""

import torch
from torch import nn


def mesh_of(*sizes):
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", sizes)


def placed(tensor, place):
    """A tensor that all ranks have, as they are to share it."""
    from torch.distributed.tensor import distribute_tensor

    return tensor.clone() if place is None else distribute_tensor(tensor.clone(), *place)


def whole(t):
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def replica_and_shard():
    """A mesh of two ranks; a replicated and a sharded parameter on it; and the same on one process."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, start = mesh_of(2), torch.arange(12.0).view(4, 3)
    ours = [nn.Parameter(placed(start, (mesh, [placement]))) for placement in (Replicate(), Shard(0))]
    return mesh, ours, [nn.Parameter(start.clone()) for _ in ours]
