"""`gptkernels demo`: the whole project in a few minutes: train, check, measure, sample."""

from __future__ import annotations

import time

from model.config import resolve
from model.report import duration

PRESET = "shakespeare-cpu"


def heading(text: str) -> None:
    """What comes next."""
    print(f"\n== {text}", flush=True)


def demo(steps: int, out: str) -> int:
    """Train the preset on Shakespeare, compare the fast model with the reference, measure both; 0 when all went well."""
    from benchmarks.cli import main as bench
    from model.equivalence import main as check
    from model.train import train

    began = time.perf_counter()
    heading(f"train: {PRESET} on the fast model, {steps} steps")
    # A shorter demo keeps the shape of the schedule.
    overrides = [f"steps={steps}", f"warmup={max(steps // 20, 1)}", f"eval_every={max(steps // 8, 1)}", f"out={out}"]
    config, _ = resolve(PRESET, overrides)
    result = train(config, label="demo")
    if result["interrupted"]:
        return 130
    heading("check: the fast model against the reference, both against float64")
    checked = check([PRESET])
    heading("bench: a training step of the reference, plain PyTorch, torch.compile and the fast model")
    measured = bench(["train", "--preset", PRESET, "--quick"])
    heading(f"done in {duration(time.perf_counter() - began)}")
    print(
        f"validation loss {result['val_loss']:.4f} after {steps} steps in {duration(result['seconds'])} ({result['data']})"
    )
    print(f"check {'passed' if checked == 0 else 'FAILED'}, bench {'ran' if measured == 0 else 'FAILED'}")
    print(f"the run: {result['run']}, its picture {result['run']}/loss.svg, its text:\n\n{result['sample']}")
    return checked or measured
