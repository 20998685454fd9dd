"""What Triton's interpreter does not see: accesses outside the arguments, and races between the programs of a grid.

Inside `checked()` every load, store and atomic of an interpreted kernel is compared with the extents of the tensors
passed to it (views, not their whole storage), and remembered per element: a program that writes what another one read
or wrote raises, whatever the order in which the interpreter happens to run them. Integer overflow raises as well. Races
inside one program cannot be seen: the interpreter runs a program as one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from gptkernels import interpreter

NOBODY, SEVERAL = -1, -2
# What an access is called once it is done, and which ones of other programs it must not meet.
DONE = {"load": "read", "store": "written", "atomic": "atomically changed"}
CONFLICTS = {
    "load": ("written", "atomically changed"),
    "store": ("written", "read", "atomically changed"),
    "atomic": ("written", "read"),
}


class OutOfBounds(AssertionError):
    """An access outside every tensor argument."""


class Race(AssertionError):
    """Two programs of a grid touch one element, and the order decides the result."""


@dataclasses.dataclass
class Argument:
    """The bytes that one tensor argument reaches."""

    name: str
    tensor: torch.Tensor
    start: int
    end: int


@dataclasses.dataclass
class Region:
    """Arguments that overlap, with who has read, written and atomically changed each of their elements, if anybody has."""

    start: int
    end: int
    element: int  # bytes, a power of 2
    programs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def who(self, done: str) -> np.ndarray:
        """The program that has done it to each element, NOBODY or SEVERAL."""
        if done not in self.programs:
            size = -(-(self.end - self.start) // self.element)
            self.programs[done] = np.full(size, NOBODY, dtype=np.int64)
        return self.programs[done]


def arguments_of(values: Mapping[str, Any]) -> list[Argument]:
    """Every tensor among a kernel's arguments, descriptors and tuples included."""
    found = []
    for name, value in values.items():
        if isinstance(value, tuple):
            found += arguments_of({f"{name}[{i}]": item for i, item in enumerate(value)})
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            found.append(Argument(name, tensor, start, start + span * tensor.element_size()))
    return found


def regions_of(arguments: list[Argument]) -> list[Region]:
    """The arguments merged where they overlap, by address."""
    regions: list[Region] = []
    for argument in sorted(arguments, key=lambda a: a.start):
        size = argument.tensor.element_size()
        if regions and argument.start < regions[-1].end:
            last = regions.pop()
            regions.append(Region(last.start, max(last.end, argument.end), min(last.element, size)))
        else:
            regions.append(Region(argument.start, argument.end, size))
    return regions


class Watch:
    """The observer of launches: holds the regions of the kernel that runs now."""

    def begin(self, kernel: str, arguments: Mapping[str, Any], grid: tuple[int, int, int]) -> None:
        self.kernel, self.grid = kernel, grid
        self.arguments = arguments_of(arguments)
        self.regions = regions_of(self.arguments)
        self.starts = np.array([r.start for r in self.regions], dtype=np.int64)
        self.ends = np.array([r.end for r in self.regions], dtype=np.int64)

    def program(self, index: tuple[int, int, int]) -> None:
        self.now = int(np.ravel_multi_index(index, self.grid))

    def end(self) -> None:
        self.arguments, self.regions = [], []

    def access(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        """Check one load, store or atomic; pointers are byte addresses, masked-off lanes touch nothing."""
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, np.shape(mask)))
        addresses = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64)
        if not addresses.size:
            return
        # Nearly always they lie in one region, which is found by their ends.
        only = int(np.searchsorted(self.starts, addresses.min(), side="right")) - 1
        if only >= 0 and addresses.max() + size <= self.ends[only]:
            self.note(kind, self.regions[only], addresses, size)
            return
        addresses = np.unique(addresses)
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (which < 0) | (addresses + size > self.ends[which])
        if outside.any():
            self.raise_out_of_bounds(kind, addresses[outside], size)
        for i in np.unique(which):
            self.note(kind, self.regions[i], addresses[which == i], size)

    def note(self, kind: str, region: Region, addresses: np.ndarray, size: int) -> None:
        """Remember who touched the elements and compare with who did before."""
        elements = (addresses - region.start) >> (region.element.bit_length() - 1)
        if size > region.element:
            elements = (elements[:, None] + np.arange(size // region.element)).ravel()
        for done in CONFLICTS[kind]:
            if done not in region.programs:
                continue
            others = region.programs[done][elements]
            bad = (others != NOBODY) & (others != self.now)
            if bad.any():
                first = bad.argmax()
                self.raise_race(kind, done, int(others[first]), int(elements[first] * region.element + region.start))
        mine = region.who(DONE[kind])
        before = mine[elements]
        mine[elements] = np.where((before == NOBODY) | (before == self.now), self.now, SEVERAL)

    def where(self, program: int) -> str:
        return str(tuple(int(i) for i in np.unravel_index(program, self.grid)))

    def raise_out_of_bounds(self, kind: str, addresses: np.ndarray, size: int) -> None:
        first = int(addresses[0])
        here = (
            f"kernel {self.kernel}, program {self.where(self.now)}: {kind} of {addresses.size} element(s) out of bounds"
        )
        if not self.arguments:
            raise OutOfBounds(f"{here}: the kernel has no tensor arguments")
        near = min(self.arguments, key=lambda a: max(a.start - first, first - a.end + size))
        offset = (first - near.start) // near.tensor.element_size()
        count = (near.end - near.start) // near.tensor.element_size()
        raise OutOfBounds(f"{here}: the first is at offset {offset} of {near.name}, whose offsets are 0 to {count - 1}")

    def raise_race(self, kind: str, done: str, other: int, address: int) -> None:
        near = next(a for a in self.arguments if a.start <= address < a.end)
        offset = (address - near.start) // near.tensor.element_size()
        who = "several programs" if other == SEVERAL else f"program {self.where(other)}"
        raise Race(
            f"kernel {self.kernel}: program {self.where(self.now)} makes a {kind} at offset {offset} of {near.name}, "
            f"which {who} has {done}"
        )


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Inside, interpreted kernels are checked for out-of-bounds accesses, races between programs and integer overflow."""
    watch = Watch()

    def itemsize(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        watch.access("load", pointers, mask.data, itemsize(pointers))
        return masked_load(self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        watch.access("store", pointers, mask.data, itemsize(pointers))
        return masked_store(self, pointers, value, mask, *rest, **options)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.access("atomic", pointers, mask.data, itemsize(pointers))
        return atomic_rmw(self, op, pointers, value, mask, *rest)

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        watch.access("atomic", pointers, np.True_, itemsize(pointers))
        return atomic_cas(self, pointers, *rest)

    masked_load, masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic_rmw, atomic_cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    replaced = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": rmw,
        "create_atomic_cas": cas,
    }
    before = interpreter.apply(tuple((InterpreterBuilder, name, f) for name, f in replaced.items()))
    interpreter.observers.append(watch)
    try:
        yield
    finally:
        interpreter.observers.remove(watch)
        interpreter.restore(before)
