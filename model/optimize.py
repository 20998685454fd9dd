"""One step of training: the schedule, AdamW, clipping, and a guard that names the first tensor that is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import Config
from model.data import generator
from model.evaluate import loss_of
from model.fast import Model


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


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, config: Config, step: int, x: Tensor, y: Tensor
) -> tuple[float, float, float]:
    """Optimizer step number `step`, from 0, on (x, y): loss and gradient norm before it, and the learning rate.

    RuntimeError, with the weights as they were, when the loss or the gradient is not finite.
    """
    t = config.train
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # A function of the step, as the batches are: a resumed run draws the masks that it would have drawn.
    seed = generator(t.seed, "dropout", step).initial_seed() if config.model.dropout else None
    loss = loss_of(model, config, x, y, seed)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_value, norm_value = float(loss.detach()), float(norm)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise RuntimeError(
            f"loss and gradient norm must be finite, got {loss_value} and {norm_value} at step {step + 1}; "
            f"not finite first: {first_non_finite(model)}. Lower lr, lengthen warmup, or set dtype=fp32"
        )
    if t.clip and norm_value > t.clip:
        # Below the limit nothing is multiplied: a pass over every gradient less.
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), t.clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value, lr


def first_non_finite(model: Model) -> str:
    """Which tensor went wrong first, in the order of the model: a weight, else a gradient."""
    named = list(model.named_parameters())
    tensors = [(name, p) for name, p in named] + [(f"the gradient of {name}", p.grad) for name, p in named]
    for name, tensor in tensors:
        if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
            return f"{name} ({bad} of {tensor.numel()} values)"
    return "no weight or gradient, only the forward"
