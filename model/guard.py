"""What is said of a step that went wrong: which one, which tensor of it first, and what text it learned from."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.fast import FastGPT, Model
from model.files import write_text
from model.micro import split
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

    def pack(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"recent": list(self.recent), "found": self.found}

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from what pack kept."""
        self.recent, self.found = deque(kept["recent"], maxlen=RECENT), kept["found"]


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

    The gradients, or the forward where the loss was not finite, are made once more: the weights are still those that the
    step found.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    if math.isfinite(loss):
        learner.gradients(step, x, y)
        norm_alone = "no value, only the gradients' norm, whose squares overflow float32"
        found = on_any_rank(learner, first_non_finite(values_of(learner.model))) or norm_alone
    else:  # every gradient behind it is not finite either
        weight = on_any_rank(learner, first_non_finite(learner.model.named_parameters()))
        found = weight or first_output(learner, step, x, y)
    learner.optimizer.zero_grad(set_to_none=True)
    return RuntimeError(
        f"loss and gradient norm must be finite, got {loss} and {norm} at step {step + 1}; not finite first: {found}. "
        f"{remedy(learner)}"
    )


def remedy(learner: Learner) -> str:
    """What helps against values that are not finite."""
    return "Lower lr or lengthen warmup" + (", or set dtype=fp32" if learner.config.train.dtype != "fp32" else "")


def on_any_rank(learner: Learner, found: str) -> str:
    """What this rank found, else that another one did, whose part of the model or batch it has not; empty if none did."""
    return (found or "on another rank") if learner.ranks.any(bool(found), torch.device("cpu")) else ""


def check_evaluation(learner: Learner, step: int, losses: Sequence[float | None]) -> None:
    """Raise where a validation loss after `step` steps is not finite."""
    for loss in losses:
        if loss is not None and not math.isfinite(loss):
            weight = on_any_rank(learner, first_non_finite(learner.model.named_parameters()))
            found = weight or "no weight, only the forward"
            raise RuntimeError(
                f"the validation loss must be finite, got {loss} after step {step}; not finite first: {found}. "
                f"{remedy(learner)}"
            )


def first_output(learner: Learner, step: int, x: Tensor, y: Tensor) -> str:
    """Which block first gives what is not finite in the forward of these sequences, in words."""
    found: list[str] = []
    with torch.no_grad(), watched(learner.model, found):
        # All of them, whatever is found: ranks with parts of the model meet in each.
        for batch in split(x, y, learner.micro, learner.held_back.device, learner.ranks.rank * len(x)):
            learner.loss(learner.model, step, batch, None)
    return on_any_rank(learner, "".join(found)) or "no weight and no block's output, only the loss"


@contextmanager
def watched(model: Model, found: list[str]) -> Iterator[None]:
    """Inside, the model's forward tells which block's output is the first that is not finite."""

    def keep(layer: int, given: Any) -> Any:
        parts = given if isinstance(given, tuple) else (given,)
        if not found and (bad := first_non_finite((f"the output of block {layer}", part) for part in parts)):
            found.append(bad)
        return given

    if isinstance(model, FastGPT):
        block, own = model.block, vars(model).get("block")
        model.block = lambda layer, *args: keep(layer, block(layer, *args))  # type: ignore[method-assign]
        try:
            yield
        finally:
            del model.block
            if own is not None:
                model.block = own  # type: ignore[method-assign]
        return
    hooks = [
        block.register_forward_hook(lambda module, args, given, layer=layer: keep(layer, given))
        for layer, block in enumerate(model.transformer.h)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def values_of(model: torch.nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Every weight, then every gradient, with its name."""
    yield from model.named_parameters()
    yield from ((f"the gradient of {name}", p.grad) for name, p in model.named_parameters())


def first_non_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """The first of named tensors that is not finite, in words; empty if all are."""
    for name, tensor in tensors:
        if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
            return f"{name} ({bad} of {tensor.numel()} values)"
    return ""
