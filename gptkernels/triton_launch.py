"""What every launch of a Triton kernel needs: the limits of the tensors' device, that device as the current one, and
little time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What tile choices depend on."""

    shared_memory: int  # bytes that a program may use
    processors: int
    descriptors: bool  # tensor descriptors become TMA
    tensor_memory: bool = False  # products are tcgen05's, whose sums lie there


# Without a GPU (interpreter, static analysis): an A100's shared memory, one processor to fill.
NO_GPU = Limits(163 * 1024, 1, False)
# Compiled kernels by what they were compiled for, and how many there may be before all are forgotten.
_compiled: dict[tuple, tuple[Any, Any, tuple]] = {}
MOST_COMPILED = 4096
NUMBERS = (int, float, bool, type(None))


@lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """The limits of a device."""
    if device.type != "cuda":
        return NO_GPU
    properties: Any = torch.cuda.get_device_properties(device)
    major = properties.major
    shared_memory, processors = properties.shared_memory_per_block_optin, properties.multi_processor_count
    return Limits(shared_memory, processors, major >= 9, 10 <= major < 12)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch on the tensors' device, whichever is current; an empty grid is no launch."""
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[grid](*arguments, **constants)
    else:
        on_device(device, launch_compiled, kernel, grid, device, arguments, constants)


def on_device(device: torch.device, call: Callable, *arguments: Any) -> None:
    """A call with the device current, where Triton launches. To make another one current costs 3 us: only where it is another."""
    if device.index == torch.cuda.current_device():
        call(*arguments)
    else:
        with torch.cuda.device(device):
            call(*arguments)


def launch_compiled(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple, constants: dict[str, Any]
) -> None:
    """Launch by the compiled kernel itself, once Triton's JIT has found it for the same arguments.

    The JIT looks at every argument, and makes a key of 30 to 40 of them, in 14 us (H200's host) each time. All that it
    looks for is in this key: dtypes and alignment of tensors, the numbers, constants and options. Python calls 1, 1.0 and
    True equal, which Triton does not: a caller gives each argument numbers of one type, and descriptors of describe().
    The key is flat, since every tuple within it would be made anew for each call.
    """
    special = [a if a.__class__ in NUMBERS else specialization(a) for a in arguments]
    key = (id(kernel), device.index, len(special), *special, *constants, *constants.values())
    found = _compiled.get(key)
    if found is not None:
        _, compiled, rest = found
        compiled[grid + (1, 1)](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is None:  # static.py, where launches are noted and nothing is compiled
        return
    if len(_compiled) >= MOST_COMPILED:
        _compiled.clear()
    # With the kernel itself, so that its id stays its own.
    _compiled[key] = kernel, compiled, tuple([constants[name] for name in kernel.arg_names[len(arguments) :]])


class Plan:
    """All of a launch but its tensors, which a kernel takes first: made once and launched often.

    Of such launches the dtypes and the alignment of the tensors are all that the JIT would find to differ.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, numbers: tuple, constants: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.device, self.numbers, self.constants = kernel, grid, device, numbers, constants
        names = kernel.arg_names
        self.rest = (*numbers, *(constants[name] for name in names if name in constants))
        self.compiled: dict[tuple, Callable] = {}

    def launch(self, *tensors: Tensor) -> None:
        """Launch on the device, whichever is current; an empty grid is no launch."""
        if 0 in self.grid:
            return
        if self.device.type != "cuda":
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        else:
            on_device(self.device, self.launch_here, tensors)

    def launch_here(self, tensors: tuple[Tensor, ...]) -> None:
        """Launch on the current device."""
        key = tuple([x.dtype if x.data_ptr() % 16 == 0 else (x.dtype, "off 16 bytes") for x in tensors])
        run = self.compiled.get(key)
        if run is not None:
            run(*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if compiled is not None:  # None in static.py
            self.compiled[key] = compiled[self.grid + (1, 1)]


def specialization(x: Any) -> Any:
    """What a kernel is compiled for of a tensor, or of a TensorDescriptor, whose address is always aligned."""
    if isinstance(x, Tensor):
        return x.dtype if x.data_ptr() % 16 == 0 else (x.dtype, "off 16 bytes")
    return (x.base.dtype, *x.block_shape)
