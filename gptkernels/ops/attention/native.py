"""forward() and backward() of the raw operators, native or Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.backend import kernels


def readable(x: Tensor) -> Tensor:
    """x, or a copy if its last dimension is not contiguous: the kernels take every other stride as it is."""
    # Not contiguous(): an empty tensor, say an expanded gradient of no tokens, is itself by that, whatever its strides.
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.clone(memory_format=torch.contiguous_format)


def forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (token-major in memory) and stats (B, H, T, 2) fp32: each row's largest score and its sum of exponentials."""
    return kernels(backend).attention_forward(readable(q), readable(k), readable(v), scale, dropout_p, seed)


def backward(
    backend: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    return kernels(backend).attention_backward(
        readable(dout), readable(q), readable(k), readable(v), out, stats, scale, dropout_p, seed, atomics
    )


def packed_forward(
    backend: str, qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and stats (B, H, T, 2)."""
    return kernels(backend).attention_packed_forward(readable(qkv), scale, dropout_p, seed)


def packed_backward(
    backend: str,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool,
) -> Tensor:
    """dqkv, contiguous in qkv's layout."""
    return kernels(backend).attention_packed_backward(
        readable(dout), readable(qkv), out, stats, scale, dropout_p, seed, atomics
    )
