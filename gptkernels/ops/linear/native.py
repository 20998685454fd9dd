"""forward() and backward() of the raw operators, native or Triton's."""

from __future__ import annotations

from torch import Tensor

from gptkernels.backend import kernels
from gptkernels.library import contiguous


def forward(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y."""
    return kernels(backend).linear_forward(x.contiguous(), weight.contiguous(), contiguous(bias))


def backward(backend: str, dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (empty without a bias)."""
    return kernels(backend).linear_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), has_bias)
