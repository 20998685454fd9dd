"""One case of a benchmark: its columns gated, then timed side by side, then weighed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.compiler import reason, unavailable
from benchmarks.harness import Column, figures, progress, speedups, timed_rounds
from benchmarks.machine import Roofs
from benchmarks.memory import measured_in_subprocess
from benchmarks.op import DTYPES
from benchmarks.options import Options
from gptkernels.cost import Cost
from model.equivalence_rule import Row

# kernels.md's rule: twice the plain error for what comes out, three times for gradients.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# For torch's own operators. Where they round more than the written-out form does (F.layer_norm's weight gradient adds
# up rows one after another, a sum() adds pairs), that is no mistake of the column; one errs by orders of magnitude.
TORCH_FACTOR = 10.0
# The extra column of a bf16 run: the same work of ours in fp32.
OURS_FP32 = "ours fp32"

Judge = Callable[[Column], "list[Row] | None"]


def column_names(options: Options) -> list[str]:
    """The columns of a table, in order."""
    names = ["reference", "eager", *(["compile"] if options.compile else []), "ours"]
    return names + ([OURS_FP32] if options.dtype == "bf16" else [])


def factor(column: str, gradient: bool) -> float:
    """How many times the error of the written-out form a column may make."""
    if column in ("eager", "compile"):
        return TORCH_FACTOR
    return GRADIENT_FACTOR if gradient else OUTPUT_FACTOR


def column_dtype(name: str, dtype: str) -> torch.dtype:
    """The dtype that a column works in."""
    return torch.float32 if name == OURS_FP32 else DTYPES[dtype]


def run_case(
    title: str,
    names: Sequence[str],
    rows: Sequence[str],
    *,
    build: Callable[[str], Column],
    judge: Judge,
    cost: Callable[[str, torch.dtype], Cost],
    work: dict[str, object],
    options: Options,
) -> dict[str, object]:
    """Every figure of a case. judge gives a column's errors, None for a bound; only columns that pass are timed.

    cost tells a row's flops and bytes in a dtype, work what a process that measures a column's memory must build.
    """
    columns, notes, warm = gated(title, names, build, judge)
    roofs = Roofs(sorted({column_dtype(name, options.dtype) for name in names}, key=str), options.quick)
    share = options.budget / max(len(columns), 1)
    times = timed_rounds(columns, roofs.columns, options.rounds, share, warm)
    for column in columns:
        dtype = column_dtype(column.name, options.dtype)
        for row in rows:
            seconds = times[column.name][row]
            note = figures(seconds, cost(row, dtype), roofs.flops(times, dtype), roofs.bytes(times))
            notes[column.name][row] = note
    if options.memory:
        for column in columns:
            if "bound" not in notes[column.name]:
                progress(f"{title}: memory of {column.name}")
                measured = measured_in_subprocess({**work, "column": column.name, **options.work()})
                notes[column.name]["memory"] = measured
        progress("")
    return {
        "case": title,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "budget": options.budget,
        "rows": list(rows),
        "roof": roofs.figures(times),
        "columns": notes,
        "speedup": speedups(notes, rows),
        "passed": all(note["passed"] for note in notes.values()),
    }


def gated(
    title: str, names: Sequence[str], build: Callable[[str], Column], judge: Judge
) -> tuple[list[Column], dict[str, dict], dict[str, float]]:
    """The columns that may be timed, what is to be said of every column before, and the seconds of the gate's run."""
    columns: list[Column] = []
    notes: dict[str, dict] = {}
    warm: dict[str, float] = {}
    for name in names:
        progress(f"{title}: gate of {name}")
        column = build(name)
        start = time.perf_counter()
        try:
            errors = judge(column)
        except RuntimeError as error:
            if name != "compile" or not unavailable(error):
                raise
            # No compiler is no wrong result: the column is left out, and the table says why.
            notes[name] = {"passed": True, "unavailable": reason(error)}
            continue
        notes[name] = {"passed": True, "bound": True} if errors is None else gate_figures(errors)
        # What torch.compile needed the first time is no measure of a run.
        if errors is not None and name != "compile":
            warm[name] = time.perf_counter() - start
        if notes[name]["passed"]:
            columns.append(column)
    return columns, notes, warm


def gate_figures(errors: Sequence[Row]) -> dict[str, object]:
    """How near a column came to its limit, and what went beyond."""
    failed = [row.figures() for row in errors if not row.passed]
    worst = max(errors, key=lambda row: row.error / row.allowed if row.allowed else 0.0)
    gate = {"quantities": len(errors), "worst": worst.figures(), "failed": failed}
    return {"passed": not failed, "gate": gate}
