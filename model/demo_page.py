"""The page that the demo ends with: what was trained, whether it is right, how fast it is, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.chart import bar_chart
from model.equivalence_page import check_parts
from model.equivalence_report import sentence
from model.equivalence_run import Result
from model.page import facts, figure, heading, page, paragraph, pictures, pre, verdict
from model.report import count, duration
from model.run_files import JSON_LINES, read_json_lines
from model.run_page import loss_figure

Facts = Sequence[tuple[str, str]]


def demo_page(run: Mapping[str, Any], result: Result, about: Facts, bench: Mapping[str, Any]) -> str:
    """run is what training returned, result and about are those of check, bench is the JSON of bench train."""
    folder = Path(run["run"])
    first = [
        ("trained", f"{count(run['parameters'])} parameters, {run['step']} steps in {duration(run['seconds'])}"),
        ("validation loss", f"{run['val_loss']:.4f} on the whole validation part ({run['data']})"),
        ("run folder", str(folder)),
    ]
    parts = [
        "<h1>A GPT, trained, proved and measured</h1>",
        facts(first),
        pictures([loss_figure(read_json_lines(folder / JSON_LINES)), speed_figure(bench["cases"][0])]),
        heading("What it writes"),
        paragraph("A sample of the trained model, at temperature 0.8.", "soft"),
        pre(run["sample"]),
        heading("Is it equal?"),
        verdict(result.passed, sentence(result.rows)),
        facts(about),
        *check_parts(result),
    ]
    return page("gptkernels demo", parts)


def speed_figure(case: Mapping[str, Any]) -> str:
    """The time of a whole training step in each column that was measured; ours, the fastest backend's, is the last."""
    ours = case.get("ours", ["ours"])[0]
    names = {"reference": "reference", "eager": "best eager", "compile": "torch.compile", ours: "ours"}
    times = {name: note["step"]["ms"] for name, note in case["columns"].items() if name in names and "step" in note}
    bars = [(names[name], ms, f"{ms:.1f} ms") for name, ms in times.items()]
    if ours not in times:
        return figure("Time of a training step", "", (), "Not measured: ours did not pass its comparison with float64.")
    ratios = [f"{ms / times[ours]:.2f} times as fast as {names[name]}" for name, ms in times.items() if name != ours]
    svg = bar_chart("Time of a training step", bars)
    text = (
        f"Median of {case['rounds']} interleaved rounds, forward, backward and optimizer. Ours is {', '.join(ratios)}."
    )
    return figure("Time of a training step", svg, (), text)
