"""What is said of a step that went wrong: which one, and which tensor of it first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.optimize import Learner, MicroBatch


def failure(learner: Learner, step: int, batches: Sequence[MicroBatch], loss: float, norm: float) -> RuntimeError:
    """The error for step number `step`, from 0, whose loss or gradient norm was not finite.

    The gradients are made once more: the weights are still those that the step found.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    learner.gradients(step, batches)
    found = first_non_finite(learner.model)
    learner.optimizer.zero_grad(set_to_none=True)
    remedy = "Lower lr or lengthen warmup"
    if learner.config.train.dtype != "fp32":
        remedy += ", or set dtype=fp32"
    return RuntimeError(
        f"loss and gradient norm must be finite, got {loss} and {norm} at step {step + 1}; not finite first: {found}. {remedy}"
    )


def first_non_finite(model: torch.nn.Module) -> str:
    """Which tensor went wrong first, in the order of the model: a weight, else a gradient."""
    named = list(model.named_parameters())
    tensors = [(name, p) for name, p in named] + [(f"the gradient of {name}", p.grad) for name, p in named]
    for name, tensor in tensors:
        if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
            return f"{name} ({bad} of {tensor.numel()} values)"
    return "no weight or gradient, only the forward"
