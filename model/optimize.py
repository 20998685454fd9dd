"""One step of training: micro batches, the schedule, AdamW, clipping, and a guard that waits for no result.

A GPU is never asked for a number within a step. The optimizer takes the clip and the guard as tensors: it divides the
gradients by one and leaves the weights alone where the other is 1. A step that is not finite holds all later ones back as
well, so that whoever reads the losses, some steps on, finds the weights as that step found them (model/guard.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.config import Config
from model.data import generator
from model.evaluate import loss_of
from model.fast import Model
from model.memory import parts_of
from model.micro import MicroBatch, next_smaller, out_of_memory, split
from model.parallel import like, replicate, shard, stand_in, synchronising, whole_norm
from model.precision import make_scaler
from model.ranks import Ranks
from model.recompute import recompute
from model.reference import IGNORE_INDEX, Seed

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What came out of a step: loss and gradient norm before it, still on the device, and its learning rate."""

    step: int
    loss: Tensor
    norm: Tensor
    lr: float
    norms: dict[str, Tensor]  # of the gradient of each layer, where they were asked for


class FullTogether(torch.OutOfMemoryError):
    """The memory of one rank or more has run out, and every rank knows of it."""


def learning_rate(step: int, config: Config) -> float:
    """Linear warmup, then from lr to min_lr by schedule; step counts from 0.

    cosine is nanoGPT's. wsd stays at lr and goes down in the last part of the steps with 1 - sqrt, which leaves the
    number of steps open until then (Hagele et al. 2024, arXiv 2405.18392).
    """
    t = config.train
    if step < t.warmup:
        return t.lr * (step + 1) / (t.warmup + 1)
    begin = t.warmup if t.schedule == "cosine" else max(t.steps * (1.0 - t.decay), t.warmup)
    done = min(max(step - begin, 0.0) / max(t.steps - begin, 1), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if t.schedule == "cosine" else 1.0 - math.sqrt(done)
    return t.min_lr + share * (t.lr - t.min_lr)


def averaging(step: int, config: Config) -> float:
    """The share of itself that the average of the weights keeps in a step, from 0: ema, and less in the first steps.

    A constant one would hold on to the initial, random weights: 0.999 keeps an eighth of them after 2000 steps.
    """
    return min(config.train.ema, (1 + step) / (10 + step))


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; only tensors of two and more dimensions decay, and a tied tensor is one tensor."""
    t = config.train
    parameters = [p for p in model.parameters() if p.requires_grad]  # each tensor once, however many names it has
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


def layer_norms(model: Model) -> dict[str, Tensor]:
    """The norm of the gradient of each block, and of each other part of the model."""
    layers: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts = name.removeprefix("transformer.").split(".")
            layers.setdefault(f"block {parts[1]}" if parts[0] == "h" else parts[0], []).append(p.grad)
    return {layer: whole_norm(gradients) for layer, gradients in layers.items()}


def copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write values over tensors; one at a time, as FSDP's have no other way."""
    for x, value in zip(into, values, strict=True):
        x.copy_(value)


@dataclass
class Learner:
    """A model and what a step changes beside its weights."""

    config: Config
    model: Model
    micro: int  # sequences of one forward
    ranks: Ranks = field(default_factory=Ranks)
    notes: list[str] = field(default_factory=list)  # what the user should know, until it is shown
    optimizer: torch.optim.Optimizer = field(init=False)
    forward: Callable[..., Any] = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    tried: int = field(default=0, init=False)  # the micro batch that all ranks have had room for
    held_back: Tensor = field(init=False)  # 1.0 from the first step on that was not finite
    average: list[Tensor] = field(init=False)  # of each parameter; empty without ema

    def __post_init__(self) -> None:
        t, device = self.config.train, self.model.lm_head.weight.device
        recompute(self.model, t.recompute)
        if self.sharded:
            shard(self.model, t.offload)
        self.optimizer = make_optimizer(self.model, self.config)
        self.forward = torch.compile(self.model, fullgraph=True) if t.compile else self.model
        if self.ranks.count > 1 and not self.sharded:
            self.forward = replicate(self.forward, device)
        self.scaler = make_scaler(t.dtype, device)
        self.held_back = torch.zeros((), device=device)
        self.average = [p.detach().clone() for p in self.model.parameters()] if t.ema else []

    def step(self, step: int, x: Tensor, y: Tensor, detailed: bool = False) -> Outcome:
        """Optimizer step number `step`, from 0, on sequences that are still on the host."""
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.gradients(step, x, y)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole_norm(gradients).to(loss.device)
        norms = layer_norms(self.model) if detailed else {}
        self.update(step, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(step, loss, norm, lr, norms)

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a part of every tensor alone."""
        return parts_of(self.config, self.ranks) > 1

    @property
    def home(self) -> torch.device:
        """Where the weights are between their uses, and the optimizer works."""
        return self.optimizer.param_groups[0]["params"][0].device

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient norm that is not finite is no failure: the scaler leaves the step out and scales less."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0

    def pack(self) -> dict[str, Any]:
        """What a checkpoint keeps of the learner."""
        numbers = {"scaler": self.scaler.state_dict(), "micro": self.micro}
        if self.sharded:
            return numbers | {"parts": self.tensors()}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        return numbers | state

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by its name in a checkpoint in parts; one of many names once."""
        # Not named_parameters: after an evaluation FSDP still has those around the blocks whole; state_dict takes them back.
        weights = self.model.state_dict()
        if self.config.model.tie:
            del weights["lm_head.weight"]
        found = {f"model.{name}": x for name, x in weights.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{key}": x for key, x in state.items()}
        return found | {f"average.{i}": x for i, x in enumerate(self.average)}

    def restore(self, payload: dict[str, Any]) -> None:
        """Go on from what pack kept."""
        if "parts" in payload:
            self.restore_parts(payload["parts"])
        else:
            self.restore_whole(payload)
        if payload["scaler"]:  # none of a run that has not been in fp16 so far
            self.scaler.load_state_dict(payload["scaler"])
        if self.config.train.micro_batch == payload["config"]["train.micro_batch"] == "auto":
            self.micro = payload["micro"]  # as it began, to be the same run

    def restore_parts(self, folder: Path) -> None:
        """Read what this rank holds of the tensors in a folder."""
        from model.parts import index_of, read_parts  # not at the top: seconds of imports

        stored = index_of(folder)
        if any(name.startswith("optimizer.") for name in stored):
            self.start_optimizer()
        read_parts(folder, {name: x for name, x in self.tensors().items() if name in stored or name[:7] != "average"})
        if self.average and "average.0" not in stored:
            copy(self.average, [p.detach() for p in self.model.parameters()])

    def start_optimizer(self) -> None:
        """Have the optimizer make its state, which it does in its first step: in one that is held back."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        self.optimizer.found_inf = torch.ones((), device=self.home)  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)

    def restore_whole(self, payload: dict[str, Any]) -> None:
        """Take this rank's part, or all, of tensors that are whole."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: like(own.get(name, x), x) for name, x in payload["model"].items()})
        optimizer = payload["optimizer"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, state in optimizer["state"].items():
            optimizer["state"][i] = {k: like(parameters[i], x) if x.dim() else x for k, x in state.items()}
        # Its own settings are of the configuration that made the checkpoint: betas and weight decay may have changed.
        optimizer["param_groups"] = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(optimizer)
        if self.average:  # which begins at the weights where the run had none so far
            copy(
                self.average,
                map(like, self.average, payload["average"] or [p.detach() for p in self.model.parameters()]),
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, where there are any."""
        if not self.average:
            yield
            return
        parameters = [p.detach() for p in self.model.parameters()]
        own = [p.clone() for p in parameters]
        copy(parameters, self.average)
        try:
            yield
        finally:
            copy(parameters, own)

    def gradients(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """Give the parameters the gradient of the step's loss; returns the loss.

        With micro_batch=auto, what does not fit, on any rank, is tried again in smaller parts: the step is not lost.
        """
        weight = self.weight(y)
        while True:
            try:
                batches = split(x, y, self.micro, self.held_back.device, self.ranks.rank * len(x))
                if self.agreeing and self.tried != self.micro:
                    self.try_out(step, batches)
                return self.accumulate(step, batches, weight)
            except (RuntimeError, MemoryError) as error:
                if not (reason := out_of_memory(error)):
                    raise
                # In the middle of an exchange a rank cannot go back: others wait there for it.
                if self.ranks.count > 1 and not isinstance(error, FullTogether):
                    raise self.too_large(reason) from error
            # Outside of the except block, whose traceback would hold what the forward had kept.
            self.optimizer.zero_grad(set_to_none=True)
            self.shrink(len(x), reason)

    def shrink(self, sequences: int, reason: str) -> None:
        """Take smaller micro batches from here on; RuntimeError where there are none, or the setting is a number."""
        smaller = next_smaller(sequences, self.micro)
        if self.config.train.micro_batch != "auto" or not smaller:
            raise self.too_large(reason)
        self.notes.append(f"micro batches of {self.micro} do not fit into memory: going on with {smaller}")
        self.micro = smaller
        if self.held_back.device.type == "cuda":
            torch.cuda.empty_cache()  # what is left is in pieces of the wrong size

    def too_large(self, reason: str) -> RuntimeError:
        """The error of a micro batch that does not fit and cannot be made smaller here."""
        return RuntimeError(
            f"micro_batch={self.micro} does not fit into memory ({reason.splitlines()[0]}): set a smaller one or auto, "
            "recompute=full, or dtype=bf16"
        )

    @property
    def agreeing(self) -> bool:
        """Whether several ranks have to find one size of micro batches."""
        return self.ranks.count > 1 and self.config.train.micro_batch == "auto"

    def together(self, work: Callable[[], T]) -> T:
        """What work without exchanges gives; FullTogether, on every rank, where memory runs out on any."""
        reason = ""
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if not (reason := out_of_memory(error)):
                raise
        # The host's own exchange: it waits for no GPU.
        if self.ranks.any(bool(reason), torch.device("cpu")):
            raise FullTogether(reason or "on another rank")
        return result

    def try_out(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Make a micro batch of this size without an exchange, beside all that a step keeps, and forget it.

        FSDP's forward has exchanges in it, so that another model of the same size does it there.
        """

        def once() -> None:
            if not self.optimizer.state:
                self.start_optimizer()
            model = self.forward
            if self.sharded:
                model = stand_in(self.model, self.config, self.held_back.device, len(batches) > 1)
            with synchronising(model, last=False):
                self.scaler.scale(self.loss(model, step, batches[0], None)).backward()

        self.together(once)
        self.optimizer.zero_grad(set_to_none=True)
        self.tried = self.micro

    def weight(self, y: Tensor) -> Tensor | None:
        """What makes the mean of the ranks' losses the mean over the targets of all; None for one rank."""
        if self.ranks.count == 1:
            return None
        count = (y != IGNORE_INDEX).sum().to(self.held_back, non_blocking=True)
        return count / self.ranks.mean(count)

    def accumulate(self, step: int, batches: Sequence[MicroBatch], weight: Tensor | None) -> Tensor:
        """Add the gradients of micro batches to the parameters; returns the loss of the whole step."""
        losses = []

        def before_the_exchange() -> Tensor:
            for batch in batches[:-1]:
                with synchronising(self.forward, last=False):
                    loss = self.loss(self.forward, step, batch, weight)
                    self.scaler.scale(loss).backward()
                losses.append(loss.detach())
            with synchronising(self.forward, last=True):
                return self.loss(self.forward, step, batches[-1], weight)

        # FSDP exchanges all along.
        together = self.agreeing and not self.sharded
        loss = self.together(before_the_exchange) if together else before_the_exchange()
        self.scaler.scale(loss).backward()
        losses.append(loss.detach())
        return self.ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum())

    def loss(self, model: Callable[..., Any], step: int, batch: MicroBatch, weight: Tensor | None) -> Tensor:
        """A micro batch's part of the step's loss."""
        seed = dropout_seed(self.config, step, batch.first, batch.x.device)
        loss = loss_of(model, self.config, batch.x, batch.y, seed)
        loss = loss if batch.share == 1.0 else loss * batch.share
        return loss if weight is None else loss * weight

    def update(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Let the optimizer step, on the gradients clipped to the norm, unless something is not finite."""
        clip, optimizer = self.config.train.clip, self.optimizer
        # A gradient of fp16 that overflows is the scaler's business.
        failed = ~loss.isfinite() if self.scaler.is_enabled() else ~(loss.isfinite() & norm.isfinite())
        self.held_back = torch.maximum(self.held_back, failed.float())
        overflow = (~norm.isfinite()).float()
        # What torch's fused optimizers read, GradScaler's way to hand them the same two things.
        scale = (norm / clip).clamp(min=1.0).to(self.home) if clip else None
        optimizer.found_inf = torch.maximum(self.held_back, overflow).to(self.home)  # type: ignore[attr-defined]
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        if self.average:
            share = 1.0 - averaging(step, self.config)
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], share)
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        self.scaler.update()
