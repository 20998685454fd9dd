"""The tables of the CUDA kernels for `gptkernels kernels`: nvcc's figures and csrc/simt's counters as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkernels.static_cuda import Kernel
    from gptkernels.static_simt import Counts

# Column and width.
CUDA = {"CUDA kernel, by nvcc": 84, "op": 13, "sm": 4, "regs": 5, "spill": 6, "shared": 7, "threads": 8, "HMMA": 5}
CUDA |= {"LDGSTS": 7, "LDSM": 5, "ld": 3, "st": 3, "instr": 6}
SIMT = {"CUDA kernel, on simt": 25, "case": 27, "dtype": 9, "launches": 9, "warps": 6, "shared": 7, "mma": 7}
SIMT |= {"wavefronts": 11, "/mma": 6, "conflicts": 10, "sectors": 8, "/ideal": 7}


def line(cells: Iterable[object], columns: Mapping[str, int]) -> str:
    return " ".join(str(cell).ljust(width) for cell, width in zip(cells, columns.values(), strict=True)).rstrip()


def cuda_text(kernel: Kernel) -> str:
    k = kernel
    usage = (k.name, k.op, k.arch, k.registers, k.spilled, k.shared, k.threads)
    counts = (k.tensor_cores or "-", k.cp_async or "-", k.ldmatrix or "-", k.widest_load, k.widest_store)
    return line((*usage, *counts, k.instructions), CUDA)


def simt_text(counts: Counts) -> str:
    c = counts
    ratio = f"{c.wavefronts / c.mma:.2f}" if c.mma else "-"
    usage = (c.kernel, f"{c.op} {c.size}", c.dtype, c.launches, c.warps, f"{c.shared / 1024:.0f} KB", c.mma or "-")
    return line((*usage, c.wavefronts, ratio, c.conflicts, c.sectors, f"{c.excess:.3f}"), SIMT)
