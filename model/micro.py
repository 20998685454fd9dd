"""A step's sequences in micro batches: as many at once as the device holds, and the gradient of all of them together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.precision import to_device
from model.reference import IGNORE_INDEX


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward: inputs, targets, which part of the step's loss they are, the first's number."""

    x: Tensor
    y: Tensor
    share: float
    first: int


def out_of_memory(error: BaseException) -> str:
    """What an error says where the memory of a GPU or of the host has run out; empty for any other error."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return (str(error) or "out of memory") if full else ""  # C++'s has no words


def split(x: Tensor, y: Tensor, micro: int, device: torch.device, first: int = 0) -> list[MicroBatch]:
    """Micro batches on their way to the device; their shares make the sum of their losses the mean over all targets.

    Not the mean of their means: those count a target more where fewer of its micro batch are left to predict. first is
    the number of the first sequence in the step of all ranks.
    """
    counts = [int((part != IGNORE_INDEX).sum()) for part in y.split(micro)]
    if not sum(counts):
        raise ValueError("a step must have a target to predict, got only ignored ones: look at the data")
    parts = zip(x.split(micro), y.split(micro), counts, strict=True)
    # The mean over no target is no number; any target does where its share is 0.
    return [
        MicroBatch(
            to_device(part, device),
            to_device(targets if n else torch.zeros_like(targets), device),
            n / sum(counts),
            first + i * micro,
        )
        for i, (part, targets, n) in enumerate(parts)
    ]


def next_smaller(sequences: int, micro: int) -> int:
    """The next smaller size of a micro batch that divides the sequences, at most half of it; 0 after 1."""
    return next((n for n in range(micro // 2, 0, -1) if sequences % n == 0), 0)
