"""The page of a training run: its curves, the gradient of each layer, what a token leaves in memory, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.chart import Line, line_chart
from model.config import Config, to_toml
from model.page import facts, figure, folded, heading, page, paragraph, pictures, pre, table
from model.run_files import JSON_LINES, points, read_json_lines

Keys = Sequence[tuple[str, str]]


def run_page(folder: Path, config: Config, kept: Mapping[str, float], sample: str) -> str:
    """kept is how many bytes one token leaves in one layer for the backward, by operator."""
    rows = read_json_lines(folder / JSON_LINES)

    def one(title: str, column: str, name: str, text: str) -> str:
        return figure(title, line_chart(title, [Line("ours", points(rows, column))], "step", name), (), text)

    validated = [row for row in rows if row.get("val_loss") is not None]
    first = [
        ("step", f"{rows[-1]['step'] if rows else 0} of {config.train.steps}"),
        ("validation loss", f"{validated[-1]['val_loss']:.4f}" if validated else "not evaluated yet"),
        ("run folder", str(folder)),
    ]
    figures = [
        loss_figure(rows),
        one("Learning rate", "lr", "learning rate", "Warmup, then the schedule."),
        one("Gradient norm", "grad_norm", "norm", "Of the whole gradient, before it is clipped."),
        layer_figure([(row["step"], row["grad_norms"]) for row in rows if row.get("grad_norms")]),
        one("Throughput", "tokens_per_s", "tokens/s", "Of training alone; evaluations and checkpoints are left out."),
    ]
    parts = ["<h1>A training run</h1>", facts(first), pictures(figures)]
    if sample:
        parts += [heading("What it writes"), paragraph("At temperature 0.8.", "soft"), pre(sample)]
    parts += [heading("What a token leaves in memory"), memory_table(kept, config)]
    return page(f"run {folder.name}", [*parts, folded("Settings", pre(to_toml(config)))])


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The losses of a run's rows (metrics.jsonl)."""
    lines = [Line("ours", points(rows, "loss")), Line("plain", points(rows, "val_loss"), dots=True)]
    keys: Keys = (("ours", "training"), ("plain", "validation"))
    text = "Cross-entropy of the next token, in nats; a training point is one batch."
    return figure("Loss", line_chart("Loss of the run", lines, "step", "loss"), keys, text)


def layer_figure(rows: Sequence[tuple[float, Mapping[str, float]]]) -> str:
    """The gradient norm of each block over the steps: the first and the last one in colour."""
    title = "Gradient norm of each block"
    blocks = sorted(
        {name for _, norms in rows for name in norms if name.startswith("block ")}, key=lambda n: int(n[6:])
    )
    kinds = dict.fromkeys(blocks, "faint") | dict.fromkeys(blocks[-1:], "plain") | dict.fromkeys(blocks[:1], "ours")
    # Coloured ones last, to lie above.
    order = sorted(blocks, key=lambda name: kinds[name] != "faint")
    lines = [
        Line(kinds[name], [(step, norms[name]) for step, norms in rows if norms.get(name) is not None])
        for name in order
    ]
    names = (("ours", "first block"), ("plain", "last block"), ("other", "between"))
    keys: Keys = names[: len(blocks)]
    text = "A block whose norm leaves the others' is where a run goes wrong first."
    return figure(title, line_chart(title, lines, "step", "norm", log=True), keys, text)


def memory_table(kept: Mapping[str, float], config: Config) -> str:
    """Bytes for the backward by operator, for one token."""
    layers = config.model.n_layer
    rows = [(name, f"{count:,.0f}", f"{count * layers:,.0f}") for name, count in kept.items() if count]
    total = sum(kept.values())
    rows.append(("all", f"{total:,.0f}", f"{total * layers:,.0f}"))
    return table(("kept by", "bytes in a layer", f"bytes in {layers} layers"), [("", rows)])
