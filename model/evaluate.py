"""How good a model is at a moment: its loss on held-out text, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.data import Dataset, all_windows, random_batch
from model.fast import Model
from model.generate import generate
from model.precision import autocast, to_device
from model.ranks import Ranks
from model.reference import Seed

# Tokens in a forward without gradients: enough to be fast, few enough for a large vocabulary.
EVAL_TOKENS = {"cpu": 4096, "cuda": 16384}


def loss_of(model: Callable[..., Any], config: Config, x: Tensor, y: Tensor, seed: Seed | None = None) -> Tensor:
    """The loss of a batch in the run's arithmetic."""
    with autocast(config.train.dtype, x.device):
        return model(x, y, seed=seed)[1]


def mean_loss(model: Model, config: Config, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks) -> float:
    """The mean over all targets of batches of windows, each made by one rank; the device is waited for once, at the end."""
    device = model.lm_head.weight.device
    rows = max(EVAL_TOKENS[device.type] // config.model.context, 1)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, targets
    parts = (pair for x, y in batches for pair in zip(x.split(rows), y.split(rows), strict=True))
    while group := list(islice(parts, ranks.count)):
        # A rank without a part makes the last one without counting it: parts of a model are gathered by all ranks.
        x, y = group[min(ranks.rank, len(group) - 1)]
        loss = loss_of(model, config, to_device(x, device), to_device(y, device))
        if ranks.rank < len(group):
            sums += torch.stack((loss.double() * y.numel(), torch.full_like(loss, y.numel(), dtype=torch.float64)))
    loss, count = ranks.total(sums).tolist()
    return loss / count


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, config: Config, step: int, ranks: Ranks | None = None) -> dict[str, Any]:
    """Validation loss over the whole validation part, and over random windows as nanoGPT does."""
    t, context, tokens = config.train, config.model.context, dataset.val
    ranks, training = ranks or Ranks(), model.training
    model.eval()
    full = mean_loss(model, config, all_windows(tokens, max(EVAL_TOKENS["cuda"] // context, 1), context), ranks)
    # Other windows at every step, the same ones in a resumed run.
    draws = range(step * 100_003, step * 100_003 + t.eval_batches)
    windows = (random_batch(tokens, config.sequences, context, t.seed, draw, "val") for draw in draws)
    random = mean_loss(model, config, windows, ranks) if t.eval_batches else None
    model.train(training)
    return {
        "val_loss": full,
        "val_loss_random": random,
        "perplexity": math.exp(min(full, 700.0)),
        "bits_per_byte": full / math.log(2.0) * (len(tokens) - 1) / dataset.val_bytes,
    }


def sample_text(model: Model, dataset: Dataset, config: Config) -> str:
    """A sample of the model, from where `sample` without a prompt begins."""
    tokenizer, t = dataset.tokenizer, config.train
    start = tokenizer.encode(tokenizer.start).to(model.lm_head.weight.device)
    tokens = generate(model, start, t.sample_tokens, temperature=0.8, seed=t.seed, vocabulary=len(tokenizer))
    return tokenizer.decode(torch.tensor(list(tokens), dtype=torch.int64)).strip("\n")
