"""What a run shows: the machine, and a table of columns side by side for every case."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.breakdown import lines as breakdown_lines

LOSES = "LOSES"
# What a reader knows columns as.
NAMES = {"eager": "best eager", "compile": "torch.compile"}
# Ours may be this much slower than another column and count as its equal: the noise of one measurement.
NOISE = 0.02


def read_object(file: Path, wanted: str) -> dict:
    """The JSON object in a file; ValueError that says what was wanted where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be {wanted}, got no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be {wanted}, got JSON that is no object")
    return content


def refuse_quick(benches: Sequence[Mapping]) -> None:
    """Raise where a table is asked for of figures that are no measurement."""
    if quick := [bench for bench in benches if bench["quick"]]:
        raise ValueError(f"the table needs full measurements, got {len(quick)} made with --quick: run them without")


def machine_line(machine: Mapping[str, object]) -> str:
    """The machine and the software on one line."""
    gpu = ""
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']} ({machine['sm_count']} SMs, {machine['gpu_memory_gib']} GiB), driver {machine['driver']}, "
            f"CUDA {machine['cuda']}, triton {machine['triton']}, "
        )
    return gpu + (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']} "
        f"(our kernels: {machine['kernels']}), torch {machine['torch']}, commit {str(machine['commit'])[:12]}, "
        f"{machine['date']}"
    )


def case_text(case: Mapping) -> str:
    """The title, the roofs, the table and what must be said about it."""
    columns = case["columns"]
    timed = [name for name, note in columns.items() if case["rows"][0] in note]
    cache = f", {case['cache']} cache" if case.get("cache", "as-is") != "as-is" else ""
    lines = [f"{case['case']}, {case['dtype']}{cache}", roof_line(case["roof"])]
    if timed:
        lines += ["", *aligned([("", "", *timed), *table_rows(case, timed)])]
    if "breakdown" in case:
        lines += ["", *aligned(breakdown_lines(case["breakdown"], our_columns(case)))]
    return "\n".join([*lines, "", *remarks(case)])


def roof_line(roof: Mapping) -> str:
    """The roofs of the case's own rounds."""
    matmuls = [
        f"matmul {dtype} {rate(m['gflops'])} GFLOP/s ({m['layout']}, {m['size']}^3)"
        for dtype, m in roof["matmul"].items()
    ]
    line = f"roof: {', '.join(matmuls)}, copy {rate(roof['copy_gbps'])} GB/s"
    if not (apart := roof.get("cores_ns")):  # of one thread, of a GPU, of older results
        return line
    return f"{line}; cores {statistics.median_low(apart)} ns apart ({apart[0]} to {apart[-1]})"


def table_rows(case: Mapping, timed: Sequence[str]) -> list[tuple[str, ...]]:
    """Every line of the table as cells."""
    columns, result = case["columns"], []
    for row in case["rows"]:
        of = [columns[name][row] for name in timed]
        result += [
            (row, "ms, median", *(milliseconds(f["ms"]) for f in of)),
            ("", "p20-p80", *(f"{milliseconds(f['ms_p20'])}-{milliseconds(f['ms_p80'])}" for f in of)),
            *against_lines(case, timed, row),
            ("", "GFLOP/s", *(rate(f["gflops"]) for f in of)),
            ("", "GB/s", *(rate(f["gbps"]) for f in of)),
            ("", "% of matmul", *(f"{f['matmul_roof_percent']:.0f}" for f in of)),
            ("", "% of roofline", *(f"{f['roofline_percent']:.0f}" for f in of)),
        ]
        graphs = [columns[name].get("graph", {}).get(row) for name in timed]
        if any(graphs):
            result += [
                ("", "graph ms", *(milliseconds(f["ms"]) if f else "-" for f in graphs)),
                *against_lines(case, timed, row, graph=True),
                ("", "graph % of roofline", *(f"{f['roofline_percent']:.0f}" if f else "-" for f in graphs)),
            ]
    hosts = [columns[name].get("host") for name in timed]
    if any(hosts):
        result.append(("launches", "host ms", *(milliseconds(host["ms"]) if host else "-" for host in hosts)))
    kept = [columns[name].get("kept_bytes") for name in timed]
    if any(value is not None for value in kept):
        result.append(("", "kept for backward MB", *("-" if value is None else f"{value / 1e6:.1f}" for value in kept)))
    memories = [columns[name].get("memory", {}) for name in timed]
    if any("peak_mb" in memory for memory in memories):
        for text, key in (("peak MB", "peak_mb"), ("beyond gradients", "peak_beyond_gradients_mb")):
            cells = (f"{memory[key]:.1f}" if key in memory else "-" for memory in memories)
            result.append(("memory" if key == "peak_mb" else "", text, *cells))
    return result


def our_columns(case: Mapping) -> list[str]:
    """The columns of ours that have a time."""
    return [name for name in case.get("ours", ["ours"]) if case["rows"][0] in case["columns"].get(name, {})]


def against_lines(case: Mapping, timed: Sequence[str], row: str, graph: bool = False) -> list[tuple[str, ...]]:
    """How many times faster each column of ours is than the others; a loss is marked, a bound is not there to be beaten."""
    words = ", graph" if graph else ""
    return [
        ("", f"{ours} against{words}", *(against(case, ours, name, row, graph) for name in timed))
        for ours in our_columns(case)
    ]


def figures_of(note: Mapping, row: str, graph: bool) -> Mapping:
    """A column's figures of a row, launched or as a CUDA graph; empty where it has none."""
    return (note.get("graph", {}) if graph else note).get(row, {})


def ratio(case: Mapping, ours: str, name: str, row: str, graph: bool = False) -> float | None:
    """A column's time over that of a column of ours; None between columns of ours, and where there is no time."""
    if name in case.get("ours", ["ours"]):
        return None
    theirs, mine = (figures_of(case["columns"].get(column, {}), row, graph) for column in (name, ours))
    return theirs["ms"] / mine["ms"] if theirs and mine else None


def loses(value: float) -> bool:
    """Whether a ratio is a loss of ours, in every table and picture."""
    return value < 1 - NOISE


def against(case: Mapping, ours: str, name: str, row: str, graph: bool) -> str:
    """One cell of against_lines."""
    value = ratio(case, ours, name, row, graph)
    if value is None:
        return "-"
    if "bound" in case["columns"][name]:
        return f"{value:.2f}x (bound)"
    return f"{value:.2f}x {LOSES}" if loses(value) else f"{value:.2f}x"


def remarks(case: Mapping) -> list[str]:
    """Which columns have no time and why, which were timed less often, and what the gate found."""
    lines, passed = [], []
    for name, note in case["columns"].items():
        if "unavailable" in note:
            lines.append(f"{name}: not measured, {note['unavailable']}")
        elif "error" in note:
            lines.append(f"{name}: FAILED, {note['error']}")
        elif "error" in note.get("graph", {}):
            lines.append(f"{name}: FAILED as a CUDA graph, {note['graph']['error']}")
        elif "failed" in note.get("graph", {}).get("gate", {}):
            lines.append(f"{name}: WRONG as a CUDA graph, {note['graph']['gate']['failed'][0]['quantity']}")
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
        if "unavailable" in note.get("graph", {}):
            lines.append(f"{name}: no CUDA graph, {note['graph']['unavailable']}")
        if "unavailable" in note.get("memory", {}):
            lines.append(f"{name}: memory not measured, {note['memory']['unavailable']}")
    gflops = {dtype: matmul["gflops"] for dtype, matmul in case["roof"]["matmul"].items()}
    if gflops.get("bfloat16", math.inf) < gflops.get("float32", 0.0):
        lines.append(
            "torch has no fast bf16 matmul on this CPU: its roof lies below that of fp32, and ours may go beyond it"
        )
    for ours in our_columns(case):
        losses = [
            f"{row} of {name} ({value:.2f}x)"
            for name, note in case["columns"].items()
            for row in case["rows"]
            if "bound" not in note and (value := ratio(case, ours, name, row)) is not None and loses(value)
        ]
        if losses:
            lines.append(f"{ours} {LOSES} to: {', '.join(losses)}")
    if not any(case["rows"][0] in note for note in case["columns"].values() if "bound" not in note):
        lines.append("FAILED: no column has been timed")
    compared, shape = case.get("logits_compared", 0), case.get("shape", {})
    if 0 < compared < shape["B"] * shape["T"]:
        lines.append(
            f"logits are compared of {compared} of {shape['B'] * shape['T']} tokens, losses and gradients of all: whole logits "
            f"are {8 * shape['B'] * shape['T'] * shape['V'] / 1e9:.1f} GB in float64"
        )
    return [f"as near to float64 as plain PyTorch in this dtype: {', '.join(passed) or 'none'}", *lines]


def number(value: float | None) -> str:
    """A number of the gate, where null stands for NaN."""
    return "NaN" if value is None else f"{value:.2e}"


def milliseconds(ms: float) -> str:
    """Three or four digits."""
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}" if ms >= 1 else f"{ms:.3f}" if ms >= 0.1 else f"{ms:.4f}"


def rate(value: float) -> str:
    """GFLOP/s or GB/s, never with an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, words to the left and figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
