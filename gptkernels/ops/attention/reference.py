"""Causal attention in plain PyTorch, written out; autograd does its backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFF_FFFF


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for each counter, all words held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # An int64 product of two 32-bit words may wrap, but all of its 64 bits are right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """(B, H, T, S) bool, True where a weight is kept.

    Element (b, h, row, col) looks at word col % 4 of counter (col // 4, row + S - T, h, b): the row is counted on the
    keys' axis, so that a query has the same mask whether it comes alone or among its predecessors.
    """
    B, H, T, S = shape
    rows = torch.arange(S - T, S, device=seed.device)[:, None]
    quads = torch.arange((S + 3) // 4, device=seed.device)
    heads = torch.arange(H, device=seed.device)[:, None, None]
    batches = torch.arange(B, device=seed.device)[:, None, None, None]
    words = philox(seed, torch.broadcast_tensors(quads, rows & WORD, heads, batches))
    return torch.stack(words, dim=-1).flatten(-2)[..., :S] >= math.floor(p * 2**32)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k and v (B, H, S, D) to (B, H, T, D); query i sees the keys up to i + S - T."""
    B, H, T, D = q.shape
    S = k.shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    scores = (q @ k.transpose(-2, -1)) * scale
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    if T > S:
        weights = weights.masked_fill(future, 0.0)  # rows without a key: softmax of nothing is 0, not NaN
    if dropout_p > 0.0:
        assert seed is not None
        weights = weights * dropout_keep(seed, dropout_p, (B, H, T, S)) * (1.0 / (1.0 - dropout_p))
    return (weights @ v).transpose(1, 2).contiguous().transpose(1, 2)  # token-major in memory, as the kernels' is


def causal_attention_packed(
    qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """qkv (B, T, 3, H, D) to (B, T, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return causal_attention(q, k, v, scale=scale, dropout_p=dropout_p, seed=seed).transpose(1, 2)
