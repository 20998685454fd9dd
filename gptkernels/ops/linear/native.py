"""forward() and backward() of the C++ implementation; PyTorch picks it by the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.library import contiguous


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y."""
    return torch.ops.gptkernels.linear_forward(x.contiguous(), weight.contiguous(), contiguous(bias))


def backward(dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (empty without a bias)."""
    return torch.ops.gptkernels.linear_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), has_bias)
