"""How good a model is at a moment: its loss on held-out text, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.data import Dataset, all_windows, random_batch
from model.fast import Model
from model.generate import generate
from model.precision import autocast, to_device
from model.reference import Seed

# Tokens in a forward without gradients: enough to be fast, few enough for a large vocabulary.
EVAL_TOKENS = {"cpu": 4096, "cuda": 16384}


def loss_of(model: Callable[..., Any], config: Config, x: Tensor, y: Tensor, seed: Seed | None = None) -> Tensor:
    """The loss of a batch in the run's arithmetic."""
    with autocast(config.train.dtype, x.device):
        return model(x, y, seed=seed)[1]


def mean_loss(model: Model, config: Config, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The mean over all targets of batches of windows; the device is waited for once, at the end."""
    device, count = model.lm_head.weight.device, 0
    rows = max(EVAL_TOKENS[device.type] // config.model.context, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for x, y in batches:
        for part, targets in zip(x.split(rows), y.split(rows), strict=True):
            total += loss_of(model, config, to_device(part, device), to_device(targets, device)) * targets.numel()
            count += targets.numel()
    return float(total) / count


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, config: Config, step: int) -> dict[str, Any]:
    """Validation loss over the whole validation part, and over random windows as nanoGPT does."""
    t, context, tokens = config.train, config.model.context, dataset.val
    training = model.training
    model.eval()
    full = mean_loss(model, config, all_windows(tokens, max(EVAL_TOKENS["cuda"] // context, 1), context))
    # Other windows at every step, the same ones in a resumed run.
    draws = range(step * 100_003, step * 100_003 + t.eval_batches)
    windows = (random_batch(tokens, config.sequences, context, t.seed, draw, "val") for draw in draws)
    random = mean_loss(model, config, windows) if t.eval_batches else None
    model.train(training)
    size = dataset.tokenizer.byte_count(tokens[1:])
    return {
        "val_loss": full,
        "val_loss_random": random,
        "perplexity": math.exp(min(full, 700.0)),
        "bits_per_byte": full / math.log(2.0) * (len(tokens) - 1) / size,
    }


def sample_text(model: Model, dataset: Dataset, config: Config) -> str:
    """A sample of the model, from where `sample` without a prompt begins."""
    tokenizer, t = dataset.tokenizer, config.train
    start = tokenizer.encode(tokenizer.start).to(model.lm_head.weight.device)
    tokens = generate(model, start, t.sample_tokens, temperature=0.8, seed=t.seed, vocabulary=len(tokenizer))
    return tokenizer.decode(torch.tensor(list(tokens), dtype=torch.int64)).strip("\n")
