"""`bench plot`: pictures of results, each as PNG and SVG: a roofline, speed-ups, cost against a size, loss against time.

Drawn by matplotlib (`pip install -e '.[plot]'`). A picture says which machine, versions and commit its figures are from, and
the same results give the same file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.op import DTYPES
from benchmarks.tables import NAMES, figures_of, loses, our_columns, ratio, read_object

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
    "ours compiled": "#009E73",
    "cuda": "#009E73",
    "eager": "#E69F00",
    "compile": "#CC79A7",
    "reference": "#999999",
    "liger": "#56B4E9",
    "flash-attn": "#D55E00",
    "bare gemms": "#000000",
}
MARKERS = {"attention": "o", "layer_norm": "s", "mlp": "^", "linear": "v", "cross_entropy": "D"}
WANTED = (
    "a result of bench ops, train or scaling --out with a case in it, or the result.json of a run that was evaluated"
)
# An operator, a column, FLOPs a byte and GFLOP/s; what was done, the other column, and its time over ours.
Point = tuple[str, str, float, float]
Bar = tuple[str, str, float]
# A column's note to the number that is drawn of it.
Value = Callable[[Mapping], "float | None"]
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
    """Draw all pictures of the files, the runs among them in one; the paths as they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[tuple[Path, Mapping]] = []
    for file in files:
        result = read_object(file, WANTED)
        if result.get("evaluations"):
            runs.append((file, result))
            continue
        if result.get("command") != "bench" or not result.get("cases"):
            raise ValueError(f"{file} must be {WANTED}")
        with pyplot.rc_context(SETTINGS):
            for name, figure in pictures(result):
                yield from written(figure, provenance(result), folder / f"{file.stem}-{name}")
    if runs:
        results = [run for _, run in runs]
        with pyplot.rc_context(SETTINGS):
            yield from written(losses(results), run_provenance(results), folder / f"{runs[0][0].stem}-loss")


def written(figure: Figure, foot: str, stem: Path) -> Iterator[Path]:
    """Write a picture in both forms, with the line that says where its figures are from."""
    figure.text(0.01, 0.005, foot, fontsize=6, color="#555555")
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        path = stem.with_name(stem.name + suffix)
        figure.savefig(path, dpi=160, metadata=metadata)
        yield path
    pyplot.close(figure)


def pictures(result: Mapping) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each picture that a result has the figures for."""
    if result["what"] == "scaling":
        for axis in dict.fromkeys(case["axis"] for case in result["cases"]):
            yield axis, against_axis([case for case in result["cases"] if case["axis"] == axis], axis)
        return
    if bars := speedup_bars(result["cases"]):
        yield "speedup", speedups(bars, on_a_gpu(result["cases"]))
    if result["what"] == "ops" and (points := roofline_points(result["cases"])):
        yield "roofline", roofline(points, *roofs(result["cases"]))


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


def roofline_points(cases: Sequence[Mapping]) -> list[Point]:
    """What a roofline shows of best eager and ours: forward and backward together.

    Together, because an operator may do in its forward what is counted as work of the backward: linear_cross_entropy does.
    """
    graph = on_a_gpu(cases)
    return [
        (case["op"], column, of["gflops"] / of["gbps"], of["gflops"])
        for case in cases
        for column in ("eager", *our_columns(case))
        if (of := figures_of(case["columns"].get(column, {}), "both", graph))
    ]


def roofline(points: Sequence[Point], matmul: float, copy: float) -> Figure:
    """Each operator beside what the memory (GB/s) and the multipliers (GFLOP/s) allow."""
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
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
    dtype = str(DTYPES[cases[0]["dtype"]]).removeprefix("torch.")
    matmul = statistics.median_high(case["roof"]["matmul"][dtype]["gflops"] for case in cases)
    return matmul, statistics.median_high(case["roof"]["copy_gbps"] for case in cases)


def on_a_gpu(cases: Sequence[Mapping]) -> bool:
    """Whether the cases have CUDA graphs: launched one by one, small operators show the host's time alone."""
    return cases[0].get("device") == "cuda"


def speedup_bars(cases: Sequence[Mapping]) -> list[Bar]:
    """How many times faster ours is than each other column, forward and backward or the whole step."""
    bars, graph = [], on_a_gpu(cases)
    for case in cases:
        row = case["rows"][-1]
        for ours in our_columns(case):
            for other, note in case["columns"].items():
                value = ratio(case, ours, other, row, graph)
                if value is not None and "bound" not in note:
                    words = case["case"] + (f", {ours}" if len(our_columns(case)) > 1 else "")
                    bars.append((words, other, value))
    return bars


def speedups(bars: Sequence[Bar], graph: bool) -> Figure:
    """The bars, grouped by case; those that ours loses to are hatched."""
    groups = list(dict.fromkeys(words for words, _, _ in bars))
    others = list(dict.fromkeys(other for _, other, _ in bars))
    height = 0.8 / len(others)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.17 * len(bars) + 0.2 * len(groups)), layout="constrained")
    for words, other, value in bars:
        y = groups.index(words) + (others.index(other) - (len(others) - 1) / 2) * height
        axes.barh(
            y, value, height * 0.9, color=colour(other), hatch="////" if loses(value) else None, edgecolor="white"
        )
        axes.text(value, y, f" {value:.2f}x" + (" loses" if loses(value) else ""), va="center", fontsize=7)
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
    graph = on_a_gpu(cases)
    launch = ", as CUDA graphs" if graph else ""
    panels: list[tuple[str, str, Value]] = [
        (
            f"Time against {axis}{launch}",
            "ms, forward and backward",
            lambda note: figures_of(note, "both", graph).get("ms"),
        )
    ]
    if any("peak_mb" in note.get("memory", {}) for case in cases for note in case["columns"].values()):
        panels.append((f"Memory against {axis}", "MB at the peak", lambda note: note.get("memory", {}).get("peak_mb")))
    figure = pyplot.figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    at = sorted({case["at"] for case in cases})
    for place, (title, unit, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        draw_lines(axes, cases, value)
        axes.set(title=title, ylabel=unit, xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(at, [str(x) for x in at], rotation=45)
        axes.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return with_foot(figure)


def draw_lines(axes: Axes, cases: Sequence[Mapping], value: Value) -> None:
    """One line for each operator and column."""
    for op in dict.fromkeys(case["op"] for case in cases):
        of = [case for case in cases if case["op"] == op]
        for column in ("eager", *our_columns(of[0])):
            points = [(case["at"], y) for case in of if (y := value(case["columns"].get(column, {})))]
            if points:
                style = {"color": colour(column), "marker": MARKERS.get(op, "x"), "ms": 4}
                axes.plot(*zip(*points, strict=True), label=f"{op}, {NAMES.get(column, column)}", **style)


def losses(runs: Sequence[Mapping]) -> Figure:
    """The validation loss of runs against the seconds that they had trained."""
    figure, axes = pyplot.subplots(figsize=(7.5, 3.8), layout="constrained")
    axes.set_prop_cycle(color=list(dict.fromkeys(COLOURS.values())))
    for run in runs:
        _, seconds, loss = zip(*run["evaluations"], strict=True)
        name = f"{Path(run['run']).name}, {run['config']['train.model']} model"
        label = f"{name}: {loss[-1]:.3f} after {run['step']} steps, {seconds[-1]:.0f} s"
        axes.plot(seconds, loss, label=label, marker="o", ms=4)
    axes.set(title="Validation loss against time", xlabel="seconds in steps of training", ylabel="nats a token")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    return with_foot(figure)


def run_provenance(runs: Sequence[Mapping]) -> str:
    """Where the figures of runs are from."""
    lines = [
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit'][:12]}, {m['date'][:10]}"
        for m in (run["machine"] for run in runs)
    ]
    return "; ".join(dict.fromkeys(lines))


def with_foot(figure: Figure) -> Figure:
    """The figure with room for the line that says where it is from."""
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    return figure
