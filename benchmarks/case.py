"""One case of a benchmark: its columns gated, then timed side by side, then weighed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence

import torch

from benchmarks.compiler import reason, unavailable
from benchmarks.device import clock_of
from benchmarks.graph import Replay
from benchmarks.harness import Column, Times, figures, progress, speedups, time_figures, timed_rounds
from benchmarks.machine import Roofs, roofs_of
from benchmarks.memory import gpu_peak, measured_in_subprocess
from benchmarks.op import DTYPES
from benchmarks.options import Options
from gptkernels.backend import available_backends
from gptkernels.cost import Cost
from model.equivalence_rule import Row

# The rule of CONTRIBUTING.md: twice the plain error for what comes out, three times for gradients.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# For torch's own operators and other libraries'. Where they round more than the written-out form does (F.layer_norm's
# weight gradient adds up rows one after another, a sum() adds pairs), that is no mistake of the column; one errs by orders
# of magnitude.
TORCH_FACTOR = 10.0
# The extra column of a bf16 run: the same work of ours in fp32.
OURS_FP32 = "ours fp32"
# The extra column of a training step: ours under torch.compile, as `compile=on` trains.
OURS_COMPILED = "ours compiled"
COMPILED = ("compile", OURS_COMPILED)
# The columns of ours on a GPU; the first that works is the one that the ratios of a case are of.
GPU_BACKENDS = ("triton", "cuda")

# A column and its results, to their errors.
Judge = Callable[[Column, object], "list[Row] | None"]
RowCost = Callable[[str, torch.dtype], Cost]
RowFigures = Callable[[str, dict[str, Times]], dict[str, dict[str, float]]]


def column_names(options: Options) -> list[str]:
    """The columns of a table, in order."""
    names = ["reference", "eager", *(["compile"] if options.compile else []), *our_names(options)]
    return names + ([OURS_FP32] if options.dtype == "bf16" and options.device == "cpu" else [])


def our_names(options: Options) -> list[str]:
    """The columns of ours: one on a CPU, one a backend on a GPU."""
    if options.device == "cpu":
        return ["ours"]
    return list(GPU_BACKENDS) if options.backend == "auto" else [options.backend]


def factor(column: str, gradient: bool) -> float:
    """How many times the error of the written-out form a column may make."""
    if column not in ("reference", "ours", OURS_FP32, OURS_COMPILED, *GPU_BACKENDS):
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
    cost: RowCost,
    gradient_bytes: int,
    work: dict[str, object],
    options: Options,
) -> dict[str, object]:
    """Every figure of a case. judge gives a column's errors, None for a bound; only columns that pass are timed.

    cost tells a row's flops and bytes in a dtype, work what a process that measures a column's memory must build.
    """
    columns, notes, warm = gated(title, names, build, judge, options)
    roofs = roofs_of(sorted({column_dtype(name, options.dtype) for name in names}, key=str), options)
    share = options.budget / max(len(columns), 1)
    times = timed_rounds(columns, roofs.columns, options.rounds, share, warm)

    def row_figures(name: str, times: dict[str, Times]) -> dict[str, dict[str, float]]:
        """A column's figures, beside the roofs of the same rounds."""
        dtype = column_dtype(name, options.dtype)
        flops, traffic = roofs.flops(times, dtype), roofs.bytes(times)
        return {row: figures(times[name][row], cost(row, dtype), flops, traffic) for row in rows}

    for column in columns:
        notes[column.name] |= row_figures(column.name, times)
        if "host" in times[column.name]:
            notes[column.name]["host"] = time_figures(times[column.name]["host"])
        if (kept := column.kept_bytes()) is not None:
            notes[column.name]["kept_bytes"] = kept
    if options.device == "cuda":
        # One column after another, each in rounds with the roofs: graphs of training steps keep gigabytes, too much for all.
        for column in columns:
            progress(f"{title}: graph of {column.name}")
            note = graph_note(column, judge, row_figures, roofs, share, options)
            notes[column.name]["graph"] = note
            notes[column.name]["passed"] &= note.get("passed", True)
    if options.memory:
        add_memory(title, columns, notes, gradient_bytes, work, options)
    known = [*our_names(options), OURS_COMPILED]
    ours = [name for name in known if rows[0] in notes.get(name, {})] or our_names(options)
    return {
        "case": title,
        "device": options.device,
        "dtype": options.dtype,
        "cache": options.cache,
        "rounds": options.rounds,
        "budget": options.budget,
        "rows": list(rows),
        "roof": roofs.figures(times),
        "columns": notes,
        "ours": ours,
        "speedup": speedups(notes, rows, ours[0]),
        "passed": any(rows[0] in note for note in notes.values() if "bound" not in note)
        and all(note["passed"] for note in notes.values()),
    }


def graph_note(
    column: Column, judge: Judge, row_figures: RowFigures, roofs: Roofs, share: float, options: Options
) -> dict:
    """A column's figures as CUDA graphs, or why there are none: ours may lack the memory for one, and nothing else."""
    try:
        replay = Replay(column, clock_of(options.device, options.cache))
        errors = judge(column, replay.results())
        if errors is not None and not (note := gate_figures(errors))["passed"]:
            return note
        return row_figures(column.name, timed_rounds([replay], roofs.columns, options.rounds, share, {}))
    except Exception as error:  # what no graph can hold (a wait for the GPU), more memory than is left, a bug of ours
        if column.name in our_names(options) and not isinstance(error, torch.OutOfMemoryError):
            return failure(error)
        return {"unavailable": f"{type(error).__name__}: {reason(error)}"}


def add_memory(
    title: str,
    columns: Sequence[Column],
    notes: dict[str, dict],
    gradient_bytes: int,
    work: dict[str, object],
    options: Options,
) -> None:
    """The peak memory of every column that is no bound.

    Of ours compiled there is none: what compiling must run first, at full size, leaves its results in our pool.
    """
    for column in columns:
        if "bound" in notes[column.name] or column.name == OURS_COMPILED:
            continue
        progress(f"{title}: memory of {column.name}")
        if options.device == "cuda":
            measured = gpu_peak(column, gradient_bytes)
        else:
            measured = measured_in_subprocess({**work, "column": column.name, **options.work()})
        notes[column.name]["memory"] = measured
    progress("")


def gated(
    title: str, names: Sequence[str], build: Callable[[str], Column], judge: Judge, options: Options
) -> tuple[list[Column], dict[str, dict], dict[str, float]]:
    """The columns that may be timed, what is to be said of every column before, and the seconds of the gate's run."""
    columns: list[Column] = []
    notes: dict[str, dict] = {}
    warm: dict[str, float] = {}
    for name in names:
        progress(f"{title}: gate of {name}")
        if name in GPU_BACKENDS and (missing := available_backends()[name]):
            notes[name] = {"passed": True, "unavailable": missing}
            continue
        try:
            column = build(name)
            start = time.perf_counter()
            errors = judge(column, column.results())
        except Exception as error:  # compilers and drivers raise what they like; what is not expected goes on up
            notes[name] = excuse(name, error, options)
            continue
        notes[name] = {"passed": True, "bound": True} if errors is None else gate_figures(errors)
        # What compiling needed the first time is no measure of a run; on a GPU every kernel is compiled then.
        if errors is not None and name not in COMPILED and options.device == "cpu":
            warm[name] = time.perf_counter() - start
        if notes[name]["passed"]:
            columns.append(column)
    return columns, notes, warm


def excuse(name: str, error: Exception, options: Options) -> dict[str, object]:
    """What to say of a column that raised instead of giving results; raises the error again where it is a bug here.

    No compiler and no memory is no wrong result: the column is left out, and the table says why. On a GPU a kernel of ours
    that does not run fails its column and the run, but not the figures of the others.
    """
    ours = name in our_names(options)
    if isinstance(error, torch.OutOfMemoryError) or (name in COMPILED and unavailable(error)):
        return {"passed": True, "unavailable": reason(error)}
    if options.device == "cpu" or name in ("reference", "eager"):
        raise error
    return failure(error) if ours else {"passed": True, "unavailable": f"{type(error).__name__}: {reason(error)}"}


def failure(error: Exception) -> dict[str, object]:
    """What to say of a column of ours that raised: one line for the tables, all of it for whoever looks for the bug."""
    text = "".join(traceback.format_exception(error))
    return {"passed": False, "error": f"{type(error).__name__}: {reason(error)}", "traceback": text}


def gate_figures(errors: Sequence[Row]) -> dict[str, object]:
    """How near a column came to its limit, and what went beyond."""
    failed = [row.figures() for row in errors if not row.passed]
    worst = max(errors, key=lambda row: row.error / row.allowed if row.allowed else 0.0)
    gate = {"quantities": len(errors), "worst": worst.figures(), "failed": failed}
    return {"passed": not failed, "gate": gate}
