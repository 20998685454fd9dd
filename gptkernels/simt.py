"""What csrc/simt saw while backend="simt" ran: the kernels' counters and broken rules.

    with gptkernels.simt.recording() as report:
        layer_norm(x, backend="simt")
    report.kernels["layer_norm_forward"]["load_global"]   # instructions, bytes, sectors, ideal_sectors

Counts are of warp-instructions. Sectors are the distinct 32-byte pieces of global memory that an instruction touches and
ideal_sectors what its bytes would fill; wavefronts are passes through the banks of shared memory, and those beyond
ideal_wavefronts are bank conflicts.

A lane's k-th access at a place of the code counts as one instruction with the other lanes' k-th there. Where some lanes skip
one in an unrolled loop (a head dim between two tiles, a ragged last column) these shift, and counts are off by a few percent.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gptkernels.cuda_backend import FOLDER, REBUILD, simt_unavailable


@dataclass
class Report:
    """Counters of every kernel by its name, and how often each rule was broken, with the first messages."""

    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def module() -> Any:
    """The compiled module with the reports. Raises RuntimeError where it or the simt backend is missing."""
    if simt_unavailable:
        raise RuntimeError(f"backend='simt' cannot run here: {simt_unavailable}")
    try:
        found = importlib.import_module("gptkernels._simt_report")
    except ImportError as error:
        raise RuntimeError(f"simt's reports need _simt_report, built with pybind11: {error}; {REBUILD}") from error
    found.attach(str(FOLDER / "_simt.so"))
    return found


@contextmanager
def recording() -> Iterator[Report]:
    """A report that is filled with what runs inside, also where that raises."""
    native, report = module(), Report()
    native.reset()
    try:
        yield report
    finally:
        report.kernels, report.violations, report.messages = native.kernels(), native.violations(), native.messages()


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Run warps and lanes in another order for each seed; 0 is the usual one."""
    native = module()
    native.set_schedule(seed)
    try:
        yield
    finally:
        native.set_schedule(0)


@contextmanager
def device(capability: int = 80, processors: int = 108, shared_bytes: int = 163 * 1024) -> Iterator[None]:
    """Run as on another GPU, by default an A100: kernels choose their tiles by what it has."""
    native = module()
    before = native.set_device(capability, processors, shared_bytes)
    try:
        yield
    finally:
        native.set_device(*before)
