"""linear_cross_entropy: the operator, its checks and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.backend import autocast_dtype, cast, check_backward, distinct, factor, resolve, wants_gradients
from gptkernels.ops.cross_entropy import native, reference
from gptkernels.ops.linear.api import check_weight


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear head, which holds the logits of one chunk of rows at a time.

        loss = mean over the rows n with targets_n != ignore_index of logsumexp_v(x_n . w_v) - x_n . w_(targets_n)

    Args:
        x: (N, C), float32 or bfloat16, with triton, cuda and simt float16 too (any floating dtype with backend="reference").
        weight: (V, C) in x's dtype or float32 (rounded on its way into the product when x is a 16-bit type; its gradient is
            then float32).
        targets: (N,) int64, each in [0, vocab_size) or ignore_index.
        ignore_index: the target of rows that do not count.
        reduction: "mean" or "sum".
        vocab_size: rows of weight that are words; the rest is padding, takes no part and gets a zero gradient. None: all.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "simt".
    Returns:
        0-d float32 (float64 for float64 inputs); "mean" over no row at all is NaN, as in PyTorch.
    Raises:
        ValueError: shapes, devices, reduction or vocab_size. TypeError: dtypes. RuntimeError: a target out of range, or
        the backend cannot run here.
    Numerics: logits are accumulated, kept and exponentiated in fp32 (eager bfloat16 rounds them, and so do products that
        are torch's: on GPUs, and in bfloat16 on a CPU with AMX, backend.bf16_products()). The native forward makes the
        gradients too when they are wanted: chunk by chunk, three products in all. They wait in fp32 for the backward, which
        multiplies them by what scales the loss and rounds them once. Beyond the gradients at most 13.3 million logits are
        held on a CPU (53 MB in fp32; 264 rows of 50304; twice as many in bfloat16 where products are torch's) and 103
        million, in x's dtype, on a GPU (206 MB in 16 bits; 2048 rows): a batch of fewer logits is one chunk. On a GPU also a
        copy of weight where it is rounded or its words are no multiple of 16; on a CPU with AMX where it is rounded.
    Source: the chunking of Hsu et al. 2024, arXiv 2410.10989 (Liger Kernel), section 3.
    """
    V = check(x, weight, targets, reduction, vocab_size)
    dtype = autocast_dtype(x)
    x = cast(x, dtype)
    backend = resolve(backend, x)
    if backend == "reference":
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size
        )
    weight = factor(weight, dtype)
    settings = (targets, ignore_index, reduction == "mean", V)
    if wants_gradients(x, weight):
        return LinearCrossEntropy.apply(backend, *distinct(x, weight), *settings)
    return native.forward(backend, x, weight, *settings)


def check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str, vocab_size: int | None) -> int:
    """Raise unless shapes, dtypes and devices fit together; returns how many rows of weight are words."""
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and targets.shape == x.shape[:1]
    if not fits:
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"x must be (N, C), weight (V, C) and targets (N,), got {shapes}: flatten batch and tokens")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}: convert them")
    check_weight("weight", weight, x)
    if targets.device != x.device:
        raise ValueError(f"targets must be on x's device {x.device}, got {targets.device}: move one of them")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    V = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= V <= weight.shape[0]:
        raise ValueError(f"vocab_size must be from 1 to weight's {weight.shape[0]} rows, got {V}")
    return V


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy whose forward makes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        mean: bool,
        vocab_size: int,
    ) -> Tensor:
        loss, dx, dweight = native.gradients(backend, x, weight, targets, ignore_index, mean, vocab_size)
        ctx.backend, ctx.settings = backend, (ignore_index, mean, vocab_size)
        ctx.dtypes = x.dtype, weight.dtype
        if torch.compiler.is_compiling():
            ctx.save_for_backward(dx, dweight)
        else:
            # Kept outside the saved tensors, so that the first backward can give them away without a copy.
            ctx.save_for_backward(x, weight, targets)
            ctx.gradients = (dx, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        if torch.compiler.is_compiling():
            dx, dweight = ((g * dloss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
            return None, dx, dweight, None, None, None, None
        if ctx.gradients is None:  # a second backward through a retained graph
            _, dx, dweight = native.gradients(ctx.backend, *ctx.saved_tensors, *ctx.settings)
        else:
            dx, dweight = ctx.gradients
            ctx.gradients = None
        dx, dweight = (scaled(g, dloss, dtype) for g, dtype in zip((dx, dweight), ctx.dtypes, strict=True))
        return None, dx, dweight, None, None, None, None


def scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * dloss, rounded once, in place where the dtype stays."""
    if torch._C._functorch.is_legacy_batchedtensor(dloss):  # of is_grads_batched: several factors at once
        return (gradient * dloss).to(dtype)
    # On a GPU the scale is not looked at: the host would wait for it.
    one = not dloss.is_cuda and dloss.item() == 1.0
    if gradient.dtype == dtype:
        return gradient if one else gradient.mul_(dloss)
    return gradient.to(dtype) if one else torch.mul(gradient, dloss, out=torch.empty_like(gradient, dtype=dtype))
