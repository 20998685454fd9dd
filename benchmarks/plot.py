"""`bench plot`: pictures of results, each as PNG and SVG: a roofline, speed-ups, cost against a size.

Drawn by matplotlib (`pip install -e '.[plot]'`). A picture says which machine, versions and commit its figures are from, and
the same results give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import our_columns, ratio

try:
    import matplotlib
except ImportError as error:
    raise RuntimeError(f"bench plot draws with matplotlib ({error}): `pip install -e '.[plot]'`") from None
matplotlib.use("Agg")  # files only, also where there is a display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito 2008); the same column has the same one in every picture.
COLOURS = {
    "ours": "#0072B2",
    "triton": "#0072B2",
    "cuda": "#009E73",
    "eager": "#E69F00",
    "compile": "#CC79A7",
    "reference": "#999999",
    "liger": "#56B4E9",
    "flash-attn": "#D55E00",
    "bare gemms": "#000000",
}
NAMES = {"eager": "best eager", "compile": "torch.compile"}
MARKERS = {"attention": "o", "layer_norm": "s", "mlp": "^", "linear": "v", "cross_entropy": "D"}
SETTINGS = {
    "svg.hashsalt": "gptkernels",  # else the ids in a file differ from run to run
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def plot(files: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Draw all pictures of the files; the paths as they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("command") != "bench" or not result.get("cases"):
            raise ValueError(f"{file} must be a result of bench ops, train or scaling --out with a case in it")
        with pyplot.rc_context(SETTINGS):
            for name, figure in pictures(result):
                figure.text(0.01, 0.005, provenance(result), fontsize=6, color="#555555")
                for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                    path = folder / f"{file.stem}-{name}{suffix}"
                    figure.savefig(path, dpi=160, metadata=metadata)
                    yield path
                pyplot.close(figure)


def pictures(result: Mapping) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each picture that a result has the figures for."""
    if result["what"] == "scaling":
        for axis in dict.fromkeys(case["axis"] for case in result["cases"]):
            yield axis, against_axis([case for case in result["cases"] if case["axis"] == axis], axis)
        return
    yield "speedup", speedups(result["cases"])
    if result["what"] == "ops":
        yield "roofline", roofline(result["cases"])


def provenance(result: Mapping) -> str:
    """Where the figures are from."""
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}"
    dtypes = ", ".join(dict.fromkeys(case["dtype"] for case in result["cases"]))
    quick = ", --quick" if result["quick"] else ""
    return (
        f"{where}, {dtypes}, torch {machine['torch']}, commit {machine['commit'][:12]}, {machine['date'][:10]}{quick}"
    )


def colour(column: str) -> str:
    """A column's colour."""
    return COLOURS.get(column, "#F0E442")


def best(note: Mapping, row: str) -> Mapping | None:
    """A row's figures without launches where there are some: what a roofline is about is the device."""
    return note.get("graph", {}).get(row) or note.get(row)


def roofline(cases: Sequence[Mapping]) -> Figure:
    """Each operator's forward and backward together, beside what the memory and the multipliers allow.

    Together, because an operator may do in its forward what is counted as work of the backward: linear_cross_entropy does.
    """
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    points = [
        (case["op"], column, of["gflops"] / of["gbps"], of["gflops"])
        for case in cases
        for column in ("eager", *our_columns(case))
        if (of := best(case["columns"].get(column, {}), "both"))
    ]
    matmul, copy = roofs(cases)
    corner = matmul / copy
    low, high = min(corner, *(p[2] for p in points)) / 3, max(corner, *(p[2] for p in points)) * 3
    axes.plot([low, corner, high], [low * copy, matmul, matmul], color="#333333", lw=1.2)
    beside = {"xytext": (8, 4), "textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"copy {copy:,.0f} GB/s", (low, low * copy), ha="left", va="top", **beside)
    axes.annotate(f"matmul {matmul:,.0f} GFLOP/s", (corner, matmul), ha="left", va="bottom", **beside)
    for op, column, intensity, rate in points:
        axes.scatter(intensity, rate, marker=MARKERS.get(op, "x"), s=42, color=colour(column), alpha=0.85)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of the math for each byte that must move", ylabel="GFLOP/s")
    axes.set_title("Forward and backward under the roofs")
    axes.set_ylim(top=3 * max(matmul, *(p[3] for p in points)))
    marks = [(MARKERS.get(op, "x"), "#666666", op) for op in dict.fromkeys(p[0] for p in points)]
    marks += [("o", colour(column), NAMES.get(column, column)) for column in dict.fromkeys(p[1] for p in points)]
    handles = [axes.scatter([], [], marker=marker, color=c, label=label) for marker, c, label in marks]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    return with_foot(figure)


def roofs(cases: Sequence[Mapping]) -> tuple[float, float]:
    """GFLOP/s and GB/s: the middle one of all cases, each of which has measured its own."""
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[cases[0]["dtype"]]
    matmuls = sorted(case["roof"]["matmul"][dtype]["gflops"] for case in cases)
    copies = sorted(case["roof"]["copy_gbps"] for case in cases)
    return matmuls[len(matmuls) // 2], copies[len(copies) // 2]


def speedups(cases: Sequence[Mapping]) -> Figure:
    """How many times faster ours is than each other column, forward and backward or the whole step.

    On a GPU as CUDA graphs: launched one by one, small operators show the host's time alone.
    """
    bars, graph = [], cases[0].get("device") == "cuda"
    for case in cases:
        row = case["rows"][-1]
        for ours in our_columns(case):
            for other, note in case["columns"].items():
                value = ratio(case, ours, other, row, graph)
                if value is not None and "bound" not in note:
                    words = case["case"] + (f", {ours}" if len(our_columns(case)) > 1 else "")
                    bars.append((words, other, value))
    groups = list(dict.fromkeys(words for words, _, _ in bars))
    others = list(dict.fromkeys(other for _, other, _ in bars))
    height = 0.8 / max(len(others), 1)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.17 * len(bars) + 0.2 * len(groups)), layout="constrained")
    for words, other, value in bars:
        y = groups.index(words) + (others.index(other) - (len(others) - 1) / 2) * height
        axes.barh(y, value, height * 0.9, color=colour(other), hatch="////" if value < 1 else None, edgecolor="white")
        axes.text(value, y, f" {value:.2f}x" + (" loses" if value < 1 else ""), va="center", fontsize=7)
    axes.axvline(1.0, color="#333333", lw=1)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set(
        xlabel="times as fast as",
        title="Their time over ours" + (", as CUDA graphs" if graph else ""),
        xlim=(0, 1.15 * max(b[2] for b in bars)),
    )
    handles = [axes.barh([0], [0], color=colour(other), label=NAMES.get(other, other)) for other in others]
    figure.legend(handles=handles, fontsize=8, loc="outside upper right", ncols=len(handles))
    return with_foot(figure)


def against_axis(cases: Sequence[Mapping], axis: str) -> Figure:
    """Time, and peak memory where it was measured, of forward and backward against a size."""
    memory = any("peak_mb" in note.get("memory", {}) for case in cases for note in case["columns"].values())
    figure, panels = pyplot.subplots(
        1, 1 + memory, figsize=(4.6 * (1 + memory), 4.2), layout="constrained", squeeze=False
    )
    draw_lines(panels[0][0], cases, lambda note: note.get("both", {}).get("ms"))
    panels[0][0].set(ylabel="ms, forward and backward", title=f"Time against {axis}")
    if memory:
        draw_lines(panels[0][1], cases, lambda note: note.get("memory", {}).get("peak_mb"))
        panels[0][1].set(ylabel="MB at the peak", title=f"Memory against {axis}")
    for panel in panels[0]:
        panel.set(xscale="log", yscale="log", xlabel=axis)
        at = sorted({case["at"] for case in cases})
        panel.set_xticks(at, [str(x) for x in at], rotation=45)
        panel.minorticks_off()
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return with_foot(figure)


def draw_lines(axes: Axes, cases: Sequence[Mapping], value: Any) -> None:
    """One line for each operator and column."""
    for op in dict.fromkeys(case["op"] for case in cases):
        of = [case for case in cases if case["op"] == op]
        for column in ("eager", *our_columns(of[0])):
            points = [(case["at"], y) for case in of if (y := value(case["columns"].get(column, {})))]
            if points:
                style = {"color": colour(column), "marker": MARKERS.get(op, "x"), "ms": 4}
                axes.plot(*zip(*points, strict=True), label=f"{op}, {NAMES.get(column, column)}", **style)


def with_foot(figure: Figure) -> Figure:
    """The figure with room for the line that says where it is from."""
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    return figure
