"""How good a model is at a moment: its loss on held-out text, and what it writes."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.data import Dataset, all_windows, random_batch
from model.fast import Model
from model.generate import generate

# Tokens in a forward of the full pass: enough to be fast, few enough for a large vocabulary.
EVAL_TOKENS = 4096


def loss_of(model: Model, config: Config, x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
    """The loss of a batch in the run's arithmetic: bf16 by autocast, else as the parameters are."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=config.train.dtype == "bf16"):
        return model(x, y, seed=seed)[1]


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, config: Config, step: int) -> dict[str, Any]:
    """Validation loss over the whole validation part, and over random windows as nanoGPT does."""
    t, context, tokens = config.train, config.model.context, dataset.val
    device, training = model.lm_head.weight.device, model.training
    model.eval()

    def value(x: Tensor, y: Tensor) -> float:
        return float(loss_of(model, config, x.to(device), y.to(device)))

    total = sum(value(x, y) * y.numel() for x, y in all_windows(tokens, max(EVAL_TOKENS // context, 1), context))
    full = total / (len(tokens) - 1)
    # Other windows at every step, the same ones in a resumed run.
    draws = range(step * 100_003, step * 100_003 + t.eval_batches)
    random = [value(*random_batch(tokens, t.batch, context, t.seed, draw, "val")) for draw in draws]
    model.train(training)
    size = len(dataset.tokenizer.decode(tokens[1:]).encode("utf-8"))
    return {
        "val_loss": full,
        "val_loss_random": statistics.fmean(random) if random else None,
        "perplexity": math.exp(min(full, 700.0)),
        "bits_per_byte": full / math.log(2.0) * (len(tokens) - 1) / size,
    }


def sample_text(model: Model, dataset: Dataset, config: Config) -> str:
    """A sample of the model, from where `sample` without a prompt begins."""
    tokenizer, t = dataset.tokenizer, config.train
    start = tokenizer.encode(tokenizer.start).to(model.lm_head.weight.device)
    tokens = generate(model, start, t.sample_tokens, temperature=0.8, seed=t.seed, vocabulary=len(tokenizer))
    return tokenizer.decode(torch.tensor(list(tokens), dtype=torch.int64)).strip("\n")
