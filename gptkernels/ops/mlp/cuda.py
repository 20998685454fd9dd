"""gelu_mlp on CUDA: GELU in the epilogues of csrc/mlp's products, or in a pass beside cuBLAS's where those are faster.

cuBLASLt's own epilogues (GELU_AUX_BIAS, DGELU_BGRAD) are not used: of them torch offers only the one that does not leave
h, which the backward needs. The same code runs backend="simt" on CPU tensors, with csrc/mlp's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.ops.linear.cuda import KERNELS, bias_gradient, own_products, product, rows, weight_gradient


def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """y, and h for the backward."""
    if own_products(x):
        return KERNELS.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, tanh)
    h = product(x, w_fc, b_fc)
    return product(KERNELS.gelu(h, tanh), w_proj, b_proj), h


def gelu_mlp_backward(
    dy: Tensor, x: Tensor, h: Tensor, w_fc: Tensor, w_proj: Tensor, has_b_fc: bool, has_b_proj: bool, tanh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_fc, db_fc, dw_proj, db_proj (empty without that bias)."""
    if own_products(x):
        return KERNELS.gelu_mlp_backward(dy, x, h, w_fc, w_proj, has_b_fc, has_b_proj, tanh)
    dy_rows, x_rows, h_rows = rows(dy), rows(x), rows(h)
    dh = torch.mm(dy_rows, w_proj.to(x.dtype))
    g, db_fc = KERNELS.gelu_backward(dh, h_rows, w_fc, tanh, has_b_fc)
    dx = torch.mm(dh, w_fc.to(x.dtype)).view(x.shape)
    dw_fc, dw_proj = weight_gradient(dh, x_rows, w_fc), weight_gradient(dy_rows, g, w_proj)
    return dx, dw_fc, db_fc, dw_proj, bias_gradient(dy_rows, w_proj, has_b_proj)
