"""What processes say to each other; every call also works in a lone process, without torch.distributed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def start(kind: str) -> torch.device:
    """The device of this process, after joining the process group that torchrun describes in the environment, if any.

    kind: "cuda" or "cpu". Raises ValueError where a host has fewer CUDA devices than processes.
    """
    cards, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    cuda = kind == "cuda"
    if cuda and local >= cards:
        raise ValueError(f"--device: cuda needs a device for each process, but local rank {local} finds {cards}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        # gloo beside NCCL carries what lives on the host: objects, and the few numbers that ranks add up every step.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """Everyone's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def total(*numbers: float) -> list[float]:
    """The sum of each number over all ranks."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()
def copy_from_first(tensors: list[torch.Tensor]) -> None:
    """Overwrite the tensors with rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
