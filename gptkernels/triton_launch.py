"""What every launch of a Triton kernel needs: the limits of the tensors' device, and that device as the current one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Limits(NamedTuple):
    """What tile choices depend on."""

    shared_memory: int  # bytes that a program may use
    processors: int
    descriptors: bool  # tensor descriptors become TMA


# Without a GPU (interpreter, static analysis): an A100's shared memory, one processor to fill.
NO_GPU = Limits(163 * 1024, 1, False)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """The limits of a device."""
    if device.type != "cuda":
        return NO_GPU
    properties: Any = torch.cuda.get_device_properties(device)
    return Limits(properties.shared_memory_per_block_optin, properties.multi_processor_count, properties.major >= 9)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch on the tensors' device, whichever is current; an empty grid is no launch.

    Triton launches on the current device. To make another one current costs 3 us, so only where it is another.
    """
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)
