"""Linear layer: written out, F.linear, ours."""

from __future__ import annotations

import torch
from torch import Tensor

import gptkernels
from benchmarks import best_eager
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.linear import reference


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x (N, C), weight (K, C) and bias (K,)."""
    x, weight, bias = random_leaves(dtype, device, (shape["N"], shape["C"]), (shape["K"], shape["C"]), (shape["K"],))
    with torch.no_grad():
        weight.mul_(shape["C"] ** -0.5)
    return x, weight, bias


OP = Op(
    name="linear",
    title="linear",
    # GPT-2's query, key and value projection.
    shapes=({"N": 2048, "C": 768, "K": 2304},),
    gpu_shapes=({"N": 16384, "C": 768, "K": 2304},),
    small={"N": 33, "C": 64, "K": 96},
    inputs=inputs,
    reference=reference.linear,
    eager=best_eager.linear,
    ours=gptkernels.linear,
    cost=lambda s, dtype_bytes: cost.linear(s["N"], s["C"], s["K"], dtype_bytes),
)
