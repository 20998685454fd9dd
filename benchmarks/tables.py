"""What a run shows: the machine, and a table of columns side by side for every case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LOSES = "LOSES"


def machine_line(machine: Mapping[str, object]) -> str:
    """The machine and the software on one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']} "
        f"(our kernels: {machine['kernels']}), torch {machine['torch']}, commit {str(machine['commit'])[:12]}, "
        f"{machine['date']}"
    )


def case_text(case: Mapping) -> str:
    """The title, the roofs, the table and what must be said about it."""
    columns = case["columns"]
    timed = [name for name, note in columns.items() if case["rows"][0] in note]
    lines = [f"{case['case']}, {case['dtype']}", roof_line(case["roof"])]
    if timed:
        lines += ["", *aligned([("", "", *timed), *table_rows(case, timed)])]
    return "\n".join([*lines, "", *remarks(case)])


def roof_line(roof: Mapping) -> str:
    """The roofs of the case's own rounds."""
    matmuls = [
        f"matmul {dtype} {m['gflops']:.4g} GFLOP/s ({m['layout']}, {m['size']}^3)"
        for dtype, m in roof["matmul"].items()
    ]
    return f"roof: {', '.join(matmuls)}, copy {roof['copy_gbps']:.3g} GB/s"


def table_rows(case: Mapping, timed: Sequence[str]) -> list[tuple[str, ...]]:
    """Every line of the table as cells."""
    columns, result = case["columns"], []
    for row in case["rows"]:
        of = [columns[name][row] for name in timed]
        result += [
            (row, "ms, median", *(milliseconds(f["ms"]) for f in of)),
            ("", "p20-p80", *(f"{milliseconds(f['ms_p20'])}-{milliseconds(f['ms_p80'])}" for f in of)),
            ("", "ours against", *(against(case, name, row) for name in timed)),
            ("", "GFLOP/s", *(f"{f['gflops']:.3g}" for f in of)),
            ("", "% of matmul", *(f"{f['matmul_roof_percent']:.0f}" for f in of)),
            ("", "% of roofline", *(f"{f['roofline_percent']:.0f}" for f in of)),
        ]
    memories = [columns[name].get("memory", {}) for name in timed]
    if any("peak_mb" in memory for memory in memories):
        for text, key in (("peak MB", "peak_mb"), ("beyond gradients", "peak_beyond_gradients_mb")):
            cells = (f"{memory[key]:.1f}" if key in memory else "-" for memory in memories)
            result.append(("memory" if key == "peak_mb" else "", text, *cells))
    return result


def against(case: Mapping, name: str, row: str) -> str:
    """How many times faster ours is than a column; a loss is marked, a bound is not there to be beaten."""
    ratio = case["speedup"].get(name, {}).get(row)
    if ratio is None:
        return "-"
    if "bound" in case["columns"][name]:
        return f"{ratio:.2f}x (bound)"
    return f"{ratio:.2f}x" if ratio >= 1.0 else f"{ratio:.2f}x {LOSES}"


def remarks(case: Mapping) -> list[str]:
    """Which columns have no time and why, which were timed less often, and what the gate found."""
    lines, passed = [], []
    for name, note in case["columns"].items():
        if "unavailable" in note:
            lines.append(f"{name}: not measured, {note['unavailable']}")
        elif not note["passed"]:
            worst = note["gate"]["failed"][0]
            lines.append(
                f"{name}: WRONG, not timed: {len(note['gate']['failed'])} of {note['gate']['quantities']} quantities are "
                f"farther from float64 than the rule allows, {worst['quantity']} by {number(worst['error'])} where "
                f"{number(worst['allowed'])} is allowed"
            )
        elif "gate" in note:
            passed.append(name)
        runs = note.get(case["rows"][0], {}).get("runs", case["rounds"])
        if runs < case["rounds"]:
            lines.append(f"{name}: timed {runs} of {case['rounds']} rounds, all that its share of --budget allows")
        if "unavailable" in note.get("memory", {}):
            lines.append(f"{name}: memory not measured, {note['memory']['unavailable']}")
    gflops = {dtype: matmul["gflops"] for dtype, matmul in case["roof"]["matmul"].items()}
    if gflops.get("bfloat16", math.inf) < gflops.get("float32", 0.0):
        lines.append(
            "torch has no fast bf16 matmul on this CPU: its roof lies below that of fp32, and ours may go beyond it"
        )
    losses = [
        f"{row} of {name} ({ratio:.2f}x)"
        for name, rows in case["speedup"].items()
        for row, ratio in rows.items()
        if ratio < 1.0 and "bound" not in case["columns"][name]
    ]
    if losses:
        lines.append(f"ours {LOSES} to: {', '.join(losses)}")
    return [f"as near to float64 as plain PyTorch in this dtype: {', '.join(passed) or 'none'}", *lines]


def number(value: float | None) -> str:
    """A number of the gate, where null stands for NaN."""
    return "NaN" if value is None else f"{value:.2e}"


def milliseconds(ms: float) -> str:
    """Three or four digits."""
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}" if ms >= 1 else f"{ms:.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, words to the left and figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
