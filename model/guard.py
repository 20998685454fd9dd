"""What is said of a step that went wrong: which one, which tensor of it first, and what text it learned from."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.files import write_text
from model.optimize import Learner
from model.reference import IGNORE_INDEX
from model.tokenizer import Tokenizer

# A loss is unusual this many standard deviations, and this share, above the mean of the losses before it.
DEVIATIONS, SHARE = 8.0, 0.1
RECENT = 100  # losses that say what is usual
KEPT = 10  # batches that a run keeps at most


@dataclass
class Spikes:
    """Which losses stand out from those before them."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    found: int = 0

    def usual(self, loss: float) -> float | None:
        """The usual loss where this one is unusually high, else None; None for more than a few in a run as well."""
        losses = list(self.recent)
        self.recent.append(loss)
        if len(losses) < RECENT:
            return None
        mean = sum(losses) / RECENT
        deviation = math.sqrt(sum((one - mean) ** 2 for one in losses) / RECENT)
        if loss - mean <= max(DEVIATIONS * deviation, SHARE * mean) or self.found >= KEPT:
            return None
        self.found += 1
        return mean


def keep_batch(
    folder: Path, tokenizer: Tokenizer, rank: int, step: int, x: Tensor, y: Tensor, why: dict[str, Any]
) -> Path:
    """Write down the sequences of step number `step`, from 1, as tokens and as text, and why; returns the file's path."""
    path = folder / (f"step-{step}-rank-{rank}.json" if rank else f"step-{step}.json")
    tokens = torch.cat((x, y[:, -1:]), dim=1).cpu()
    tokens[tokens == IGNORE_INDEX] = 0
    texts = [tokenizer.decode(row) for row in tokens]
    write_text(
        path, json.dumps(why | {"step": step, "texts": texts, "tokens": tokens.tolist()}, ensure_ascii=False) + "\n"
    )
    return path


def failure(learner: Learner, step: int, x: Tensor, y: Tensor, loss: float, norm: float) -> RuntimeError:
    """The error for step number `step`, from 0, whose loss or gradient norm was not finite.

    The gradients are made once more: the weights are still those that the step found.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    learner.gradients(step, x, y)
    found = first_non_finite(learner.model)
    if not found:
        forward = "no weight or gradient, only the forward"
        found = "no value, only the gradients' norm, whose squares overflow float32" if math.isfinite(loss) else forward
    learner.optimizer.zero_grad(set_to_none=True)
    remedy = "Lower lr or lengthen warmup"
    if learner.config.train.dtype != "fp32":
        remedy += ", or set dtype=fp32"
    return RuntimeError(
        f"loss and gradient norm must be finite, got {loss} and {norm} at step {step + 1}; not finite first: {found}. {remedy}"
    )


def first_non_finite(model: torch.nn.Module) -> str:
    """Which tensor went wrong first, in the order of the model: a weight, else a gradient; empty if none did."""
    named = list(model.named_parameters())
    tensors = [(name, p) for name, p in named] + [(f"the gradient of {name}", p.grad) for name, p in named]
    for name, tensor in tensors:
        if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
            return f"{name} ({bad} of {tensor.numel()} values)"
    return ""
