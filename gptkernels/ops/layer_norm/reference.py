"""LayerNorm, with or without a residual addition before it, in plain PyTorch; autograd does its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalised x over the last dimension; with a residual, the normalised sum and the sum.

    Of 16-bit numbers in fp32, as F.layer_norm: float16's squares end at 256.
    """
    total = x if residual is None else x + residual
    wide = total.float() if total.itemsize < 4 else total
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred / torch.sqrt(variance + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y.to(x.dtype)
    return y if residual is None else (y, total)
