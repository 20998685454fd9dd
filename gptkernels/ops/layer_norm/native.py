"""forward() and backward() of the raw operators, native or Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.backend import kernels
from gptkernels.library import contiguous


def forward(
    backend: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in dtype, the sum (x itself without a residual), mean and rstd (fp32)."""
    x = x.contiguous()
    weight, bias = contiguous(weight), contiguous(bias)
    if residual is None:
        y, mean, rstd = kernels(backend).layer_norm_forward(x, weight, bias, eps, dtype)
        return y, x, mean, rstd
    return kernels(backend).add_layer_norm_forward(x, residual.contiguous(), weight, bias, eps, dtype)


def backward(
    backend: str,
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the sum (dtotal, if any, included), dweight and dbias (empty where there is none)."""
    return kernels(backend).layer_norm_backward(
        dy.contiguous(), contiguous(dtotal), total, contiguous(weight), has_bias, mean, rstd
    )
