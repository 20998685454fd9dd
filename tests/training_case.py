"""A small run to train in tests: its settings, a batch, gradients; and whether two runs are the same."""

import os
import sys
from pathlib import Path

import torch

from model.checkpoint import BEST, LAST, load
from model.config import resolve
from model.run_files import read_json_lines

# What the two ranks of tests/ranks_driver.py train, and one process beside them.
KINDS = ("ddp", "fsdp")
RUN = ["dropout=0.1", "micro_batch=2", "eval_every=6", "sample_tokens=5", "ema=0.5"]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n"


def small_settings(folder):
    """Overrides of the preset tiny: 12 steps of eight sequences on a small text in the folder."""
    path = folder / "text.txt"
    path.write_text("".join(TEXT[i % 7 :] for i in range(60)))
    small = ["n_embd=16", "batch=8", "steps=12", "warmup=0", "eval_every=12", "eval_batches=1", "sample_tokens=0"]
    return [f"data={path}", f"out={folder}", "threads=1", *small]


def chosen(settings, *more):
    return resolve("tiny", [*settings, *more])[0]


def some_batch(vocabulary, ignored):
    """Eight sequences; the second half has lost most of its targets, the last two all of them."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(vocabulary, (8, 16), generator=rng)
    y = torch.randint(vocabulary, (8, 16), generator=rng)
    if ignored:
        y[4:, 3:] = -100
        y[6:] = -100
    return x, y


def gradients(learner, x, y, micro):
    learner.optimizer.zero_grad(set_to_none=True)
    learner.micro = micro
    loss = learner.gradients(0, x, y)
    return {"loss": loss} | {name: p.grad for name, p in learner.model.named_parameters()}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def same_values(a, b):
    """Whether two values of a checkpoint are equal bit for bit, however they are nested."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return a == b


def rows_of(folder):
    """metrics.jsonl without what depends on the clock."""
    rows = read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("ms", "tokens_per_s")} for row in rows]


def assert_same_run(a, b, but=("train.name",)):
    """Checkpoints, metrics and samples, bit for bit, but for settings of these names."""
    for name in (LAST, BEST):
        ours, theirs = load(a, name), load(b, name)
        for checkpoint in (ours, theirs):
            for setting in but:
                del checkpoint["config"][setting]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert same_values(ours[key], theirs[key]), f"{name}: {key}"
    assert rows_of(a) == rows_of(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()


def driver_environment():
    """Of a process that runs the project from here, in one thread."""
    root = str(Path(__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
