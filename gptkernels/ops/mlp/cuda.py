"""gelu_mlp on CUDA: GELU in the epilogues of csrc/mlp's products, or in a pass beside cuBLAS's where those are faster.

There cuBLASLt's epilogues are taken instead where `gptkernels tune` measured them to win. The same code runs backend="simt"
on CPU tensors, with csrc/mlp's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.ops.linear.choice import choose
from gptkernels.ops.linear.cuda import KERNELS, bias_gradient, own_products, product, rows, weight_gradient
from gptkernels.ops.mlp import cublaslt


def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """y, and h for the backward."""
    if own_products(x):
        return KERNELS.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, tanh)
    (F, C), x_rows = w_fc.shape, rows(x)
    if choose("gelu", len(x_rows), F, C, x.dtype, x.device, tanh) == "cublaslt":
        h, g = x.new_empty((*x.shape[:-1], F)), x.new_empty((*x.shape[:-1], F))
        cublaslt.gelu(x_rows, w_fc.to(x.dtype), b_fc, h, g)
        return product(g, w_proj, b_proj), h
    h = product(x, w_fc, b_fc)
    return product(KERNELS.gelu(h, tanh), w_proj, b_proj), h


def gelu_mlp_backward(
    dy: Tensor, x: Tensor, h: Tensor, w_fc: Tensor, w_proj: Tensor, has_b_fc: bool, has_b_proj: bool, tanh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_fc, db_fc, dw_proj, db_proj (empty without that bias)."""
    if own_products(x):
        return KERNELS.gelu_mlp_backward(dy, x, h, w_fc, w_proj, has_b_fc, has_b_proj, tanh)
    dy_rows, x_rows, h_rows = rows(dy), rows(x), rows(h)
    if choose("gelu_backward", *h_rows.shape, dy_rows.shape[1], x.dtype, x.device, tanh) == "cublaslt":
        dh, g, wider = torch.empty_like(h_rows), KERNELS.gelu(h_rows, tanh), w_fc.dtype != x.dtype
        sums = h_rows.new_empty((len(w_fc),)) if has_b_fc and not wider else None
        cublaslt.gelu_backward(dy_rows, h_rows, w_proj.to(x.dtype), dh, sums)
        db_fc = bias_gradient(dh, w_fc, has_b_fc) if sums is None else sums  # the library's are in dh's dtype
    else:
        dh = torch.mm(dy_rows, w_proj.to(x.dtype))
        g, db_fc = KERNELS.gelu_backward(dh, h_rows, w_fc, tanh, has_b_fc)
    dx = torch.mm(dh, w_fc.to(x.dtype)).view(x.shape)
    dw_fc, dw_proj = weight_gradient(dh, x_rows, w_fc), weight_gradient(dy_rows, g, w_proj)
    return dx, dw_fc, db_fc, dw_proj, bias_gradient(dy_rows, w_proj, has_b_proj)
