"""gelu(x W_fc^T + b_fc) W_proj^T + b_proj in plain PyTorch; autograd does its backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(h: Tensor, approximate: str) -> Tensor:
    """h * P(normal <= h), exactly ("none") or by the tanh formula."""
    if approximate == "none":
        return 0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0)))
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """x (..., C), w_fc (F, C), b_fc (F,), w_proj (C, F), b_proj (C,) to (..., C)."""
    h = x @ w_fc.to(x.dtype).T
    h = h if b_fc is None else h + b_fc.to(x.dtype)
    y = gelu(h, approximate) @ w_proj.to(x.dtype).T
    return y if b_proj is None else y + b_proj.to(x.dtype)
