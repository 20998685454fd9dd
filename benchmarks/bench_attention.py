"""Causal attention: written out, F.scaled_dot_product_attention, ours."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

import gptkernels
from benchmarks import best_eager
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.attention import reference


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v of (B, H, T, D)."""
    size = (shape["B"], shape["H"], shape["T"], shape["D"])
    return random_leaves(dtype, device, size, size, size)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package's kernels, which take tokens before heads and read them by their strides."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


OP = Op(
    name="attention",
    title="causal_attention",
    shapes=({"B": 8, "H": 6, "T": 256, "D": 64}, {"B": 1, "H": 12, "T": 1024, "D": 64}),
    gpu_shapes=({"B": 16, "H": 12, "T": 1024, "D": 64}, {"B": 4, "H": 16, "T": 4096, "D": 128}),
    small={"B": 2, "H": 2, "T": 33, "D": 32},
    inputs=inputs,
    reference=reference.causal_attention,
    eager=best_eager.causal_attention,
    ours=gptkernels.causal_attention,
    cost=lambda s, dtype_bytes: cost.attention(s["B"], s["H"], s["T"], s["D"], dtype_bytes),
    others={"flash-attn": flash_attn} if find_spec("flash_attn") else {},
    independent=2,  # batch and heads
)
