"""Residual addition and LayerNorm: written out, F.layer_norm on the sum, ours in one pass."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

import gptkernels
from benchmarks import best_eager
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.layer_norm import reference


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x and residual of (N, C), weight and bias of (C,)."""
    rows, width = (shape["N"], shape["C"]), (shape["C"],)
    return random_leaves(dtype, device, rows, rows, width, width)


def written_out(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The reference, with the inputs in this file's order."""
    return reference.layer_norm(x, weight, bias, residual=residual)


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The training step's, with the inputs in this file's order."""
    return best_eager.layer_norm(x, weight, bias, residual=residual)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> tuple[Tensor, ...]:
    """Both outputs in one pass."""
    return gptkernels.layer_norm(x, weight, bias, residual=residual, backend=backend)


def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Liger-Kernel's LayerNorm on torch's sum: it has none with the addition inside."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    total = x + residual
    return LigerLayerNormFunction.apply(total, weight, bias, 1e-5), total


OP = Op(
    name="layer_norm",
    title="layer_norm + residual",
    shapes=({"N": 2048, "C": 768},),
    gpu_shapes=({"N": 16384, "C": 768}, {"N": 8192, "C": 4096}),
    small={"N": 33, "C": 64},
    inputs=inputs,
    reference=written_out,
    eager=eager,
    ours=ours,
    cost=lambda s, dtype_bytes: cost.layer_norm(s["N"], s["C"], dtype_bytes, residual=True),
    others={"liger": liger} if find_spec("liger_kernel") else {},
)
