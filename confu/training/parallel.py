"""Training by several processes (torchrun): each computes its share of a step's micro-batches, and the gradients are
summed, so the step is the one that a single process would take. Collectives run by gloo on CPUs, by NCCL on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from confu.target import Target


@dataclass(frozen=True)
class World:
    """The processes that train together; by default one."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def sum(self, tensor: Tensor) -> None:
        """Add up over the processes, in place."""
        if self.size > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        votes = torch.tensor(float(flag))
        self.sum(votes)
        return votes.item() > 0

    def agree(self, module: torch.nn.Module) -> None:
        """Take the weights of the first process."""
        if self.size > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.data, src=0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does this before the others do."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()


ALONE = World()


def local_device(device: str) -> str:
    """The GPU of this process among those of its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def join(device: str) -> Iterator[World]:
    """Meet the other processes that torchrun started, as its environment says; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def shard_target(target: Target, world: World) -> None:
    """Spread the weights of the target's layers over the processes (FSDP2), for one that fits on none of them.

    A layer's weights are together only while it runs, so all processes must run the target equally often. Embedding,
    final norm and head, which the draft reads too, stay whole. Raises ValueError in a single process.
    """
    if world.size == 1:
        raise ValueError("shard_target needs several processes; start them with torchrun, or leave it out.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    decoder: Any = target.model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    target.model.to(world.device)  # type: ignore[invalid-argument]


def whole(weight: Tensor) -> Tensor:
    """A weight that may be sharded, put together; all processes must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
