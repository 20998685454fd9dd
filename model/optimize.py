"""One step of training: micro batches, the schedule, AdamW, clipping, and a guard that waits for no result.

A GPU is never asked for a number within a step. The optimizer takes the clip and the guard as tensors: it divides the
gradients by one and leaves the weights alone where the other is 1. A step that is not finite holds all later ones back as
well, so that whoever reads the losses, some steps on, finds the weights as that step found them (model/guard.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.data import generator
from model.evaluate import loss_of
from model.fast import Model
from model.precision import make_scaler
from model.reference import IGNORE_INDEX, Seed


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward: inputs, targets, and which part of the step's loss they are."""

    x: Tensor
    y: Tensor
    share: float
    first: int


@dataclass(frozen=True)
class Outcome:
    """What came out of a step: loss and gradient norm before it, still on the device, and its learning rate."""

    step: int
    loss: Tensor
    norm: Tensor
    lr: float


def split(x: Tensor, y: Tensor, micro: int) -> list[MicroBatch]:
    """A step's sequences in micro batches; their shares make the sum of their losses the mean over all its targets.

    Not the mean of their means: those count a target more where fewer of its micro batch are left to predict.
    """
    counts = [int((part != IGNORE_INDEX).sum()) for part in y.split(micro)]
    if not sum(counts):
        raise ValueError("a step must have a target to predict, got only ignored ones: look at the data")
    parts = zip(x.split(micro), y.split(micro), counts, strict=True)
    # The mean over no target is no number; any target does where its share is 0.
    return [
        MicroBatch(part, targets if n else torch.zeros_like(targets), n / sum(counts), i * micro)
        for i, (part, targets, n) in enumerate(parts)
    ]


def learning_rate(step: int, config: Config) -> float:
    """Linear warmup, then a cosine from lr towards min_lr (nanoGPT's schedule); step counts from 0."""
    t = config.train
    if step < t.warmup:
        return t.lr * (step + 1) / (t.warmup + 1)
    done = min((step - t.warmup) / max(t.steps - t.warmup, 1), 1.0)
    return t.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (t.lr - t.min_lr)


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; only tensors of two and more dimensions decay, and a tied tensor is one tensor."""
    t = config.train
    parameters = list(model.parameters())  # each tensor once, however many names it has
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=t.lr, betas=(t.beta1, t.beta2), fused=True)


def dropout_seed(config: Config, step: int, first: int, device: torch.device) -> Seed | None:
    """The seed of a micro batch's masks: a function of its place, so that a resumed run draws the same ones."""
    if not config.model.dropout:
        return None
    seed = generator(config.train.seed, f"dropout{first}" if first else "dropout", step).initial_seed()
    # A number that changes would be compiled for anew.
    return torch.full((), seed, dtype=torch.int64, device=device) if config.train.compile else seed


@dataclass
class Learner:
    """A model and what a step changes beside its weights."""

    config: Config
    model: Model
    optimizer: torch.optim.Optimizer = field(init=False)
    forward: Callable[..., Any] = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    held_back: Tensor = field(init=False)  # 1.0 from the first step on that was not finite

    def __post_init__(self) -> None:
        t, device = self.config.train, self.model.lm_head.weight.device
        self.optimizer = make_optimizer(self.model, self.config)
        self.forward = torch.compile(self.model, fullgraph=True) if t.compile else self.model
        self.scaler = make_scaler(t.dtype, device)
        self.held_back = torch.zeros((), device=device)

    def step(self, step: int, batches: Sequence[MicroBatch]) -> Outcome:
        """Optimizer step number `step`, from 0."""
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.gradients(step, batches)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.update(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(step, loss, norm, lr)

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient norm that is not finite is no failure: the scaler leaves the step out and scales less."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0

    def pack(self) -> dict[str, Any]:
        """What a checkpoint keeps of the learner."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def restore(self, payload: dict[str, Any]) -> None:
        """Go on from what pack kept."""
        self.model.load_state_dict(payload["model"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.scaler.load_state_dict(payload.get("scaler", {}))

    def gradients(self, step: int, batches: Sequence[MicroBatch]) -> Tensor:
        """Add the gradient of the step's loss to the parameters; returns the loss."""
        losses = []
        for batch in batches:
            seed = dropout_seed(self.config, step, batch.first, batch.x.device)
            loss = loss_of(self.forward, self.config, batch.x, batch.y, seed)
            loss = loss if batch.share == 1.0 else loss * batch.share
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def update(self, loss: Tensor, norm: Tensor) -> None:
        """Let the optimizer step, on the gradients clipped to the norm, unless something is not finite."""
        clip, optimizer = self.config.train.clip, self.optimizer
        # A gradient of fp16 that overflows is the scaler's business.
        failed = ~loss.isfinite() if self.scaler.is_enabled() else ~(loss.isfinite() & norm.isfinite())
        self.held_back = torch.maximum(self.held_back, failed.float())
        overflow = (~norm.isfinite()).float()
        # What torch's fused optimizers read, GradScaler's way to hand them the same two things.
        optimizer.found_inf = torch.maximum(self.held_back, overflow)  # type: ignore[attr-defined]
        optimizer.grad_scale = (norm / clip).clamp(min=1.0) if clip else None  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        self.scaler.update()
