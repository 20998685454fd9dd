"""`gptkernels demo`: the whole project in a few minutes: train, check, measure, sample."""

from __future__ import annotations

import json
import time
from pathlib import Path

from model.config import resolve
from model.files import write_text
from model.report import duration

PRESET = "shakespeare-cpu"


def heading(text: str) -> None:
    """What comes next."""
    print(f"\n== {text}", flush=True)


def demo(steps: int, out: str) -> int:
    """Train the preset on Shakespeare, compare the fast model with the reference, measure both; 0 when all went well.

    Ends with the path of a page that shows all of it.
    """
    from benchmarks.cli import main as bench
    from model.demo_page import demo_page
    from model.equivalence import compare_and_show, parse
    from model.train import train

    began = time.perf_counter()
    heading(f"train: {PRESET} on the fast model, {steps} steps")
    # A shorter demo keeps the shape of the schedule.
    overrides = [f"steps={steps}", f"warmup={max(steps // 20, 1)}", f"eval_every={max(steps // 8, 1)}", f"out={out}"]
    config, _ = resolve(PRESET, overrides)
    result = train(config, label="demo")
    if result["interrupted"]:
        return 130
    folder = Path(result["run"])
    heading("check: the trained model on our kernels against the reference, both against float64")
    checked = compare_and_show(parse([str(folder)]))
    heading("bench: a training step of the reference, plain PyTorch, torch.compile and the fast model")
    figures = folder / "bench.json"
    measured = bench(["train", "--preset", PRESET, "--quick", "--out", str(figures)])
    heading(f"done in {duration(time.perf_counter() - began)}")
    loss = f"{result['val_loss']:.4f} after {steps} steps in {duration(result['seconds'])}"
    print(f"validation loss {loss} ({result['data']})")
    print(f"check {'passed' if checked.passed else 'FAILED'}, bench {'ran' if measured == 0 else 'FAILED'}")
    print(f"the run: {folder}, its picture {folder}/loss.svg, its text:\n\n{result['sample']}")
    report = folder / "report.html"
    figures_of = json.loads(figures.read_text(encoding="utf-8"))
    write_text(report, demo_page(result, checked.result, checked.about, figures_of))
    print(f"\nloss, text, equality and speed with pictures, on one page: {report.resolve()}")
    return measured if checked.passed else 1
