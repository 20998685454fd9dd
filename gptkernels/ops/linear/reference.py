"""y = x W^T + b in plain PyTorch; autograd does its backward."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C_in), weight (C_out, C_in), bias (C_out,) to (..., C_out)."""
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)
