"""Several processes that train one model, one a device, as torchrun starts them; alone, every function here does nothing."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Long enough for an evaluation's sample or a checkpoint by one rank, short enough not to wait for a dead one all night.
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks, on the device, without waiting for it."""
        return self.total(x) / self.count if self.count > 1 else x

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.count > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def least(self, number: int) -> int:
        """The smallest of a number that each rank has, which the host knows."""
        least = torch.tensor(number)
        if self.count > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    def said_by_first(self, word: str) -> str:
        """What the first rank says, on every rank."""
        words = [word]
        if self.count > 1:
            dist.broadcast_object_list(words)
        return words[0]

    def any(self, wish: bool, device: torch.device) -> bool:
        """Whether any rank wishes something."""
        return bool(self.total(torch.tensor(float(wish), device=device))) if self.count > 1 else wish

    def lost(self, error: BaseException) -> bool:
        """Whether an error is that of an exchange with a process that is no longer there."""
        return self.count > 1 and (isinstance(error, dist.DistError) or "onnection" in str(error))


def begins_first() -> bool:
    """Whether this process will be the first rank, asked before it has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK") == "0"


def local_rank() -> int:
    """The number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_count() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_share() -> slice:
    """Which of a list of things this process does, where those on its machine do them together: all of them if alone."""
    return slice(local_rank() % local_count(), None, local_count())


def join(device: torch.device) -> Ranks:
    """Meet the other processes that torchrun has started, if it has."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo beside nccl: for what is in the host's memory, as offload=on has it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Part from the other processes, so that none of them waits for this one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
