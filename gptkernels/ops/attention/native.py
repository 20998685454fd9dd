"""forward() and backward() of the C++ implementation; PyTorch picks it by the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """x, or a copy if its last dimension is not contiguous: the kernels take every other stride as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (token-major in memory) and stats (B, H, T, 2) fp32: each row's largest score and its sum of exponentials."""
    return torch.ops.gptkernels.attention_forward(readable(q), readable(k), readable(v), scale, dropout_p, seed)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    return torch.ops.gptkernels.attention_backward(
        readable(dout), readable(q), readable(k), readable(v), out, stats, scale, dropout_p, seed
    )


def packed_forward(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and stats (B, H, T, 2)."""
    return torch.ops.gptkernels.attention_packed_forward(readable(qkv), scale, dropout_p, seed)


def packed_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """dqkv, contiguous in qkv's layout."""
    return torch.ops.gptkernels.attention_packed_backward(
        readable(dout), readable(qkv), out, stats, scale, dropout_p, seed
    )
