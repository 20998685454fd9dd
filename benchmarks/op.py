"""What a benchmarked operator is: its shapes, inputs, cost, and the ways to compute it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Column
from gptkernels.cost import OpCost

Shape = dict[str, int]
Outputs = Tensor | tuple[Tensor, ...]
# Outputs, and the gradients of the inputs.
Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Op:
    """An operator as the benchmark sees it: the shapes, the inputs and three ways to compute the same outputs.

    `reference` and `eager` take the inputs; `ours` takes them and `backend`. `extra` makes one more column from
    the inputs, for a bound that is no competitor.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    small: Shape
    inputs: Callable[[Shape, torch.dtype], tuple[Tensor, ...]]
    reference: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    ours: Callable[..., Outputs]
    cost: Callable[[Shape, int], OpCost]
    extra: Callable[[tuple[Tensor, ...]], Column] | None = None


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """The outputs of an operator, always as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def random_leaves(dtype: torch.dtype, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Normal tensors that require gradients, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes)


def output_gradients(outputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """One random gradient for every output, which may lie on the meta device; 1 for a loss."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (torch.randn(y.shape, generator=generator) if y.dim() else torch.ones(())).to(y.dtype) for y in outputs
    )


class OpColumn:
    """A function of tensors, run forward and backward by autograd."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        doutputs: Sequence[Tensor],
    ) -> None:
        self.name = name
        self.function = function
        self.inputs = tuple(inputs)
        self.doutputs = tuple(doutputs)
        self.leaves = [x for x in inputs if x.requires_grad]

    def results(self) -> Results:
        """Outputs and the gradients of every leaf."""
        outputs = as_tuple(self.function(*self.inputs))
        return outputs, torch.autograd.grad(outputs, self.leaves, self.doutputs)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        outputs = as_tuple(self.function(*self.inputs))
        middle = time.perf_counter()
        gradients = torch.autograd.grad(outputs, self.leaves, self.doutputs)
        # What the forward kept is given back inside the timing: returning its pages is a real cost of the column.
        del outputs
        end = time.perf_counter()
        del gradients
        return {"forward": middle - start, "backward": end - middle, "both": end - start}
