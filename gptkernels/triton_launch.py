"""What every launch of a Triton kernel needs: the limits of the tensors' device, that device as the current one, and
little time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Limits(NamedTuple):
    """What tile choices depend on."""

    shared_memory: int  # bytes that a program may use
    processors: int
    descriptors: bool  # tensor descriptors become TMA
    tensor_memory: bool = False  # products are tcgen05's, whose sums lie there


# Without a GPU (interpreter, static analysis): an A100's shared memory, one processor to fill.
NO_GPU = Limits(163 * 1024, 1, False)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """The limits of a device."""
    if device.type != "cuda":
        return NO_GPU
    properties: Any = torch.cuda.get_device_properties(device)
    major = properties.major
    shared_memory, processors = properties.shared_memory_per_block_optin, properties.multi_processor_count
    return Limits(shared_memory, processors, major >= 9, 10 <= major < 12)


class Plan:
    """All of a launch but its tensors, which a kernel takes first: made once, kept by a cache, and launched often.

    The JIT looks at every argument, and makes a key of 30 to 40 of them, in 14 us (H200's host) each time. Of a plan's
    launches the dtypes and the alignment of the tensors, and which are None, are all that it would find to differ: by
    those the compiled kernel is found here.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        numbers: tuple,
        constants: dict[str, Any],
        blocks: tuple[list[int], ...] = (),
    ) -> None:
        """`blocks`: of the first tensors, which the kernel takes as tensor descriptors."""
        self.kernel, self.grid, self.device, self.numbers, self.blocks = kernel, grid, device, numbers, blocks
        # Given, because its default is about to change (Triton 3.10), and with it the rounding of every sum.
        self.constants = {"enable_fp_fusion": True, **constants}
        names = kernel.arg_names
        self.rest = (*numbers, *(constants[name] for name in names if name in constants))
        self.compiled: dict[tuple, Callable] = {}
        self.empty, self.index = 0 in grid, device.index if device.type == "cuda" else None

    def launch(self, *tensors: Tensor | None) -> None:
        """Launch on the device, whichever is current; an empty grid is no launch."""
        if self.empty:
            return
        if self.index is None:  # interpreted
            self.kernel[self.grid](*self.described(tensors), *self.numbers, **self.constants)
        elif self.index == torch.cuda.current_device():
            self.launch_here(tensors)
        else:  # to make another device current costs 3 us
            with torch.cuda.device(self.device):
                self.launch_here(tensors)

    def launch_here(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on the current device."""
        key = tuple(
            [x if x is None else x.dtype if x.data_ptr() % 16 == 0 else (x.dtype, "off 16 bytes") for x in tensors]
        )
        run = self.compiled.get(key)
        arguments = self.described(tensors) if self.blocks else tensors
        if run is not None:
            run(*arguments, *self.rest)
            return
        compiled = self.kernel[self.grid](*arguments, *self.numbers, **self.constants)
        if compiled is not None:  # None in static.py, where launches are noted and nothing is compiled
            self.compiled[key] = compiled[self.grid + (1, 1)]

    def described(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """The tensors, descriptors in the place of those that have blocks."""
        described = map(TensorDescriptor.from_tensor, tensors, self.blocks)
        return (*described, *tensors[len(self.blocks) :])
