"""Linear head and cross-entropy: written out, F.cross_entropy on whole logits, ours without the logits."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

import gptkernels
from benchmarks import best_eager
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.cross_entropy import reference


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x (N, C), weight (V, C) and targets (N,)."""
    N, C, V = shape["N"], shape["C"], shape["V"]
    x, weight = random_leaves(dtype, device, (N, C), (V, C))
    with torch.no_grad():
        weight.mul_(C**-0.5)
    return x, weight, torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).to(device)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's head and loss in one, also without the whole logits."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)
    return loss[0] if isinstance(loss, tuple) else loss  # later versions return more than the loss


OP = Op(
    name="cross_entropy",
    title="linear_cross_entropy",
    shapes=({"N": 1024, "C": 768, "V": 50257},),
    gpu_shapes=({"N": 8192, "C": 768, "V": 50257},),
    small={"N": 33, "C": 64, "V": 301},
    inputs=inputs,
    reference=reference.linear_cross_entropy,
    eager=best_eager.linear_cross_entropy,
    ours=gptkernels.linear_cross_entropy,
    cost=lambda s, dtype_bytes: cost.linear_cross_entropy(s["N"], s["C"], s["V"], dtype_bytes),
    others={"liger": liger} if find_spec("liger_kernel") else {},
)
