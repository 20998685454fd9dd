"""Residual addition and LayerNorm: written out, F.layer_norm on the sum, ours in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.layer_norm import reference


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x and residual of (N, C), weight and bias of (C,)."""
    rows, width = (shape["N"], shape["C"]), (shape["C"],)
    return random_leaves(dtype, rows, rows, width, width)


def written_out(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The reference, with the inputs in this file's order."""
    return reference.layer_norm(x, weight, bias, residual=residual)


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """torch's LayerNorm on the sum."""
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> tuple[Tensor, ...]:
    """Both outputs in one pass."""
    return gptkernels.layer_norm(x, weight, bias, residual=residual, backend=backend)


OP = Op(
    name="layer_norm",
    title="layer_norm + residual",
    shapes=({"N": 2048, "C": 768},),
    small={"N": 33, "C": 64},
    inputs=inputs,
    reference=written_out,
    eager=eager,
    ours=ours,
    cost=lambda s, dtype_bytes: cost.layer_norm(s["N"], s["C"], dtype_bytes, residual=True),
)
