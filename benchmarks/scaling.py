"""`bench scaling`: what an operator costs as one size of its work grows, or the number of threads.

The columns are best eager and ours: written-out attention at T=8192 would need gigabytes, and torch.compile of one fused
operator is that operator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.case import our_names
from benchmarks.op import Shape
from benchmarks.ops import OPS, bench_case
from benchmarks.options import Options
from benchmarks.tables import LOSES, loses, milliseconds, our_columns, ratio

AXES = ("T", "width", "batch", "threads")


@dataclass(frozen=True)
class Sweep:
    """One operator along one axis: the size that grows, its values, and the other sizes."""

    op: str
    size: str
    values: Sequence[int]
    others: Shape

    def shapes(self) -> Iterator[tuple[int, Shape]]:
        """(value, shape) of each point."""
        for value in self.values:
            shape = {**self.others, self.size: value}
            # The MLP is four times as wide inside.
            yield value, shape | ({"F": 4 * value} if self.op == "mlp" else {})


def powers(low: int, high: int) -> list[int]:
    """low, 2 low, ... up to high."""
    return [low << i for i in range((high // low).bit_length())]


SWEEPS = {
    "cpu": {
        "T": (Sweep("attention", "T", powers(128, 8192), {"B": 1, "H": 2, "D": 64}),),
        "width": (
            Sweep("layer_norm", "C", powers(128, 4096), {"N": 2048}),
            Sweep("mlp", "C", powers(128, 2048), {"N": 512}),
        ),
        "batch": (
            Sweep("attention", "B", powers(1, 32), {"H": 6, "T": 256, "D": 64}),
            Sweep("cross_entropy", "N", powers(128, 2048), {"C": 256, "V": 50257}),
        ),
    },
    "cuda": {
        "T": (Sweep("attention", "T", powers(128, 8192), {"B": 4, "H": 12, "D": 64}),),
        "width": (
            Sweep("layer_norm", "C", powers(256, 8192), {"N": 16384}),
            Sweep("mlp", "C", powers(256, 4096), {"N": 8192}),
        ),
        "batch": (
            Sweep("attention", "B", powers(1, 64), {"H": 12, "T": 1024, "D": 64}),
            Sweep("cross_entropy", "N", powers(1024, 16384), {"C": 768, "V": 50257}),
        ),
    },
}


def bench_scaling(axes: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """The cases of the axes, as they are done; with --quick the two smallest points of each sweep."""
    names = ["eager", *our_names(options)]
    few = 2 if options.quick else None
    for axis in axes:
        if axis == "threads":
            yield from threads(names, options)
            continue
        for sweep in SWEEPS[options.device][axis]:
            for value, shape in list(sweep.shapes())[:few]:
                case = bench_case(OPS[sweep.op], shape, options, names)
                yield {**case, "axis": axis, "at": value, "threads": torch.get_num_threads()}


def threads(names: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """Every operator at its first shape, on one thread, two, and so on up to the machine's cores."""
    before = torch.get_num_threads()
    try:
        for op in OPS.values():
            for count in powers(1, os.cpu_count() or 1):
                torch.set_num_threads(count)
                case = bench_case(op, op.small if options.quick else op.shapes[0], options, names)
                yield {**case, "axis": "threads", "at": count, "threads": count}
    finally:
        torch.set_num_threads(before)


def line(case: Mapping) -> str:
    """One point: the time of forward and backward, how ours compares, and the peak memory."""
    parts = []
    for name, note in case["columns"].items():
        if "both" not in note:
            parts.append(f"{name}: {note.get('unavailable') or note.get('error') or 'WRONG'}")
            continue
        words = f"{name} {milliseconds(note['both']['ms'])} ms"
        if "peak_mb" in note.get("memory", {}):
            words += f" {note['memory']['peak_mb']:.1f} MB"
        if name in our_columns(case) and (value := ratio(case, name, "eager", "both")) is not None:
            words += f" ({value:.2f}x{' ' + LOSES if loses(value) else ''})"
        parts.append(words)
    return f"{case['axis']}={case['at']:<5} {case['case']}: {', '.join(parts)}"
