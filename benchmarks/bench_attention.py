"""Causal attention: written out, F.scaled_dot_product_attention, ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.attention import reference


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v of (B, H, T, D)."""
    size = (shape["B"], shape["H"], shape["T"], shape["D"])
    return random_leaves(dtype, size, size, size)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


OP = Op(
    name="attention",
    title="causal_attention",
    shapes=({"B": 8, "H": 6, "T": 256, "D": 64}, {"B": 1, "H": 12, "T": 1024, "D": 64}),
    small={"B": 2, "H": 2, "T": 33, "D": 32},
    inputs=inputs,
    reference=reference.causal_attention,
    eager=eager,
    ours=gptkernels.causal_attention,
    cost=lambda s, dtype_bytes: cost.attention(s["B"], s["H"], s["T"], s["D"], dtype_bytes),
)
