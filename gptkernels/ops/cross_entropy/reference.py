"""Linear head and cross-entropy in plain PyTorch, on whole logits; autograd does its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """x (N, C), weight (V, C), targets (N,) to the mean or sum over the rows whose target is not ignore_index.

    The loss is at least float32: that of bfloat16 logits is taken in float32.
    """
    logits = x @ weight[:vocab_size].to(x.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    used = targets != ignore_index
    target_logits = logits.gather(1, torch.where(used, targets, 0)[:, None])[:, 0]
    losses = torch.where(used, torch.logsumexp(logits, dim=1) - target_logits, 0.0)
    return losses.sum() / used.sum() if reduction == "mean" else losses.sum()
