"""linear on CUDA: the products of csrc/linear, or cuBLAS's where those are measured to be faster.

The same code runs backend="simt" on CPU tensors, with the products of csrc/linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.ops.linear.choice import cublas_is_ahead

KERNELS = torch.ops.gptkernels_kernels


def own_products(x: Tensor) -> bool:
    """Whether products with x run on the kernels here."""
    return not x.is_cuda or not cublas_is_ahead(x.device)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by cuBLAS, in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy^T x of rows, in weight's dtype, which may be wider."""
    if weight.dtype == x.dtype:
        return torch.mm(dy.t(), x)
    return torch.mm(dy.t(), x, out_dtype=weight.dtype)


def bias_gradient(dy: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """The sums of dy's columns in weight's dtype, empty if they are not wanted."""
    if not wanted:
        return weight.new_empty((0,))
    return KERNELS.column_sums(dy, weight)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    if own_products(x):
        return KERNELS.linear_forward(x, weight, bias)
    return product(x, weight, bias)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (empty without one)."""
    if own_products(x):
        return KERNELS.linear_backward(dy, x, weight, has_bias)
    dy_rows = rows(dy)
    dx = torch.mm(dy_rows, weight.to(x.dtype)).view(x.shape)
    return dx, weight_gradient(dy_rows, rows(x), weight), bias_gradient(dy_rows, weight, has_bias)
