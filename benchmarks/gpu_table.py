"""The README's tables of a GPU: the medians of CUDA graphs, in which no column waits for the host, and peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.tables import machine_line

COLUMNS = ("reference", "eager", "compile", "triton", "cuda")
# Ours may be this much slower than the fastest other column and count as its equal: the noise of one measurement.
NOISE = 0.02


def gpu_markdown(files: Sequence[Mapping]) -> str:
    """A row for each case: milliseconds of all columns forward and backward, and ours beside the fastest other one."""
    tables = []
    for bench in files:
        columns = " | ".join(f"{name}, ms" for name in COLUMNS)
        lines = [f"| work | {columns} | best of ours against | peak memory beyond the gradients |"]
        lines += ["|" + "---|" * (len(COLUMNS) + 3)]
        lines += [f"| {' | '.join(cells(case))} |" for case in bench["cases"]]
        tables.append("\n".join([*lines, "", machine_line(bench["machine"]) + f", {bench['cases'][0]['dtype']}"]))
    return "\n\n".join(tables)


def graph_ms(case: Mapping, name: str) -> float | None:
    """Milliseconds of the whole case as a CUDA graph."""
    return case["columns"].get(name, {}).get("graph", {}).get(case["rows"][-1], {}).get("ms")


def cells(case: Mapping) -> list[str]:
    """One row of the table."""
    times = {name: graph_ms(case, name) for name in COLUMNS}
    ours = {name: ms for name in case["ours"] if (ms := times.get(name)) is not None}
    best = min(ours, key=ours.__getitem__)
    ratios = [
        f"{ms / ours[best]:.2f}x {name}{' (loses)' if ms < (1 - NOISE) * ours[best] else ''}"
        for name in ("eager", "compile")
        if (ms := times[name]) is not None
    ]
    memory = {name: case["columns"].get(name, {}).get("memory", {}).get("peak_beyond_gradients_mb") for name in COLUMNS}
    peaks = [f"{megabytes:.0f} MB {name}" for name in ("eager", "compile", best) if (megabytes := memory[name])]
    return [
        case["case"],
        *("-" if ms is None else f"{ms:.3g}" for ms in times.values()),
        f"{best}: {', '.join(ratios)}",
        ", ".join(peaks),
    ]
