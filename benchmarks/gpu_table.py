"""The README's tables of a GPU: the medians of CUDA graphs, in which no column waits for the host, and peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.tables import figures_of, loses, machine_line, milliseconds, ratio, refuse_quick

COLUMNS = ("reference", "eager", "compile", "triton", "cuda")


def gpu_markdown(files: Sequence[Mapping]) -> str:
    """A row for each case: milliseconds of all columns forward and backward, and ours beside the fastest other one."""
    refuse_quick(files)
    tables = []
    for bench in files:
        columns = " | ".join(f"{name}, ms" for name in COLUMNS)
        lines = [f"| work | {columns} | best of ours against | peak memory beyond the gradients |"]
        lines += ["|" + "---|" * (len(COLUMNS) + 3)]
        lines += [f"| {' | '.join(cells(case))} |" for case in bench["cases"]]
        tables.append("\n".join([*lines, "", machine_line(bench["machine"]) + f", {bench['cases'][0]['dtype']}"]))
    return "\n\n".join(tables)


def cells(case: Mapping) -> list[str]:
    """One row of the table."""
    row = case["rows"][-1]
    times = {name: figures_of(case["columns"].get(name, {}), row, graph=True).get("ms") for name in COLUMNS}
    ours = {name: ms for name in case["ours"] if (ms := times.get(name)) is not None}
    best = min(ours, key=ours.__getitem__, default="-")
    ratios = [
        f"{value:.2f}x {name}{' (loses)' if loses(value) else ''}"
        for name in ("eager", "compile")
        if (value := ratio(case, best, name, row, graph=True)) is not None
    ]
    memory = {name: case["columns"].get(name, {}).get("memory", {}) for name in ("eager", "compile", best)}
    peaks = [
        f"{of['peak_beyond_gradients_mb']:.0f} MB {name}"
        for name, of in memory.items()
        if "peak_beyond_gradients_mb" in of
    ]
    return [
        case["case"],
        *("-" if ms is None else milliseconds(ms) for ms in times.values()),
        f"{best}: {', '.join(ratios)}" if ratios else "-",
        ", ".join(peaks) or "-",
    ]
