"""forward() and backward() of the raw operators, native or Triton's."""

from __future__ import annotations

from torch import Tensor

from gptkernels.backend import kernels
from gptkernels.library import contiguous


def forward(
    backend: str, x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """y, and the pre-activation h (..., F) for the backward."""
    return kernels(backend).gelu_mlp_forward(
        x.contiguous(), w_fc.contiguous(), contiguous(b_fc), w_proj.contiguous(), contiguous(b_proj), tanh
    )


def backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    has_b_fc: bool,
    has_b_proj: bool,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_fc, db_fc, dw_proj, db_proj (empty without that bias)."""
    return kernels(backend).gelu_mlp_backward(
        dy.contiguous(), x.contiguous(), h, w_fc.contiguous(), w_proj.contiguous(), has_b_fc, has_b_proj, tanh
    )
