"""The ranks of a training, whether it has a process group or is one process alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def in_group() -> bool:
    """Whether this process is one of a group; one alone needs none."""
    return dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def all_reduce(tensor: torch.Tensor) -> None:
    """Sums a tensor over all ranks, in place. Collective."""
    if in_group():
        dist.all_reduce(tensor)


def barrier() -> None:
    if in_group():
        dist.barrier()


def from_rank_zero(value: Any) -> Any:
    """What rank 0 gave. Collective."""
    held = [value]
    if in_group():
        dist.broadcast_object_list(held, src=0)
    return held[0]
