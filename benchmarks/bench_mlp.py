"""GELU-MLP: written out, F.linear and F.gelu, ours, and the six bare GEMMs as the bound of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gptkernels
from benchmarks import best_eager
from benchmarks.device import Clock, CudaClock, Stages, timed
from benchmarks.op import Op, Shape, random_leaves
from gptkernels import cost
from gptkernels.ops.mlp import reference


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x (N, C), w_fc (F, C), b_fc (F,), w_proj (C, F), b_proj (C,)."""
    N, C, hidden = shape["N"], shape["C"], shape["F"]
    # The weights' deviation keeps the activations of order one, as in a trained model.
    x, w_fc, b_fc, w_proj, b_proj = random_leaves(dtype, device, (N, C), (hidden, C), (hidden,), (C, hidden), (C,))
    with torch.no_grad():
        w_fc.mul_(C**-0.5)
        w_proj.mul_(hidden**-0.5)
    return x, w_fc, b_fc, w_proj, b_proj


class BareGemms:
    """Only the matrix products, into memory that is already there: what no MLP can be faster than with torch's BLAS."""

    name, total = "bare gemms", "both"

    def __init__(self, tensors: tuple[Tensor, ...], clock: Clock | CudaClock) -> None:
        self.clock = clock
        self.x, self.w_fc, _, self.w_proj, _ = (t.detach() for t in tensors)
        self.h = self.x @ self.w_fc.t()
        self.y = self.h @ self.w_proj.t()
        self.dh, self.dx = torch.empty_like(self.h), torch.empty_like(self.x)
        self.dw_fc, self.dw_proj = torch.empty_like(self.w_fc), torch.empty_like(self.w_proj)

    def forward(self) -> None:
        """Two products."""
        torch.mm(self.x, self.w_fc.t(), out=self.h)
        torch.mm(self.h, self.w_proj.t(), out=self.y)

    def backward(self) -> None:
        """Four products."""
        torch.mm(self.y.t(), self.h, out=self.dw_proj)
        torch.mm(self.y, self.w_proj, out=self.dh)
        torch.mm(self.dh.t(), self.x, out=self.dw_fc)
        torch.mm(self.dh, self.w_fc, out=self.dx)

    def stages(self) -> Stages:
        """The timed parts in order."""
        return ("forward", self.forward), ("backward", self.backward)

    def run(self) -> dict[str, float]:
        """Seconds of forward, backward and both."""
        return timed(self.clock, self.stages(), self.total)

    def results(self) -> None:
        """None: nothing here could be compared."""

    def kept_bytes(self) -> None:
        """None: there is no backward of its own."""

    def holds(self) -> None:
        """None: the memory is there for good."""

    def gathered(self, held: Sequence[object]) -> None:
        """None, as results()."""

    def clear(self) -> None:
        """Nothing to give back."""


OP = Op(
    name="mlp",
    title="gelu_mlp",
    shapes=({"N": 2048, "C": 768, "F": 3072},),
    gpu_shapes=({"N": 16384, "C": 768, "F": 3072}, {"N": 8192, "C": 4096, "F": 16384}),
    small={"N": 33, "C": 64, "F": 128},
    inputs=inputs,
    reference=reference.gelu_mlp,
    eager=best_eager.gelu_mlp,
    ours=gptkernels.gelu_mlp,
    cost=lambda s, dtype_bytes: cost.gelu_mlp(s["N"], s["C"], s["F"], dtype_bytes),
    extra=BareGemms,
)
