"""What a benchmarked operator is: its shapes, inputs, cost, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.device import Clock, CudaClock, Stages, timed
from benchmarks.harness import Column
from benchmarks.kept import Kept
from gptkernels.cost import OpCost

Shape = dict[str, int]
Outputs = Tensor | tuple[Tensor, ...]
# Outputs, and the gradients of the inputs.
Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Op:
    """An operator as the benchmark sees it: the shapes, the inputs and three ways to compute the same outputs.

    `reference` and `eager` take the inputs; `ours` takes them and `backend`. `others` are columns of other libraries,
    where they are installed. `extra` makes one more column from the inputs, for a bound that is no competitor.
    independent is how many first dimensions, the same of every input and output, have rows that never meet: float64 can
    then be computed row by row, which at the largest shapes is what fits into memory.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    gpu_shapes: tuple[Shape, ...]
    small: Shape
    inputs: Callable[[Shape, torch.dtype, str], tuple[Tensor, ...]]
    reference: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    ours: Callable[..., Outputs]
    cost: Callable[[Shape, int], OpCost]
    others: Mapping[str, Callable[..., Outputs]] = field(default_factory=dict)
    extra: Callable[[tuple[Tensor, ...], Clock | CudaClock], Column] | None = None
    independent: int = 0


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """The outputs of an operator, always as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def random_leaves(dtype: torch.dtype, device: str, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Normal tensors that require gradients, the same in every dtype up to rounding."""
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_() for size in sizes)


def output_gradients(outputs: Sequence[Tensor], device: str, seed: int = 1) -> tuple[Tensor, ...]:
    """One random gradient for every output, which may lie on the meta device; 1 for a loss."""
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        (torch.randn(y.shape, generator=generator, device=device) if y.dim() else torch.ones((), device=device)).to(
            y.dtype
        )
        for y in outputs
    )


class OpColumn:
    """A function of tensors, run forward and backward by autograd."""

    total = "both"

    def __init__(
        self,
        name: str,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        doutputs: Sequence[Tensor],
        clock: Clock | CudaClock,
    ) -> None:
        self.name = name
        self.function = function
        self.inputs = tuple(inputs)
        self.doutputs = tuple(doutputs)
        self.clock = clock
        self.clear()

    def clear(self) -> None:
        """Give back what a run has made, and make the leaves anew.

        Autograd expects a leaf's gradient on the stream where it was first used, as long as anybody holds what came of
        it: another stream would wait for that one, which ends a capture.
        """
        self.outputs: tuple[Tensor, ...] | None = None
        self.gradients: tuple[Tensor, ...] | None = None
        self.inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in self.inputs)
        self.leaves = [x for x in self.inputs if x.requires_grad]

    def forward(self) -> None:
        """The outputs."""
        self.outputs = as_tuple(self.function(*self.inputs))

    def backward(self) -> None:
        """The gradients of the leaves. What the forward kept is given back here: its pages are a real cost of the column."""
        assert self.outputs is not None
        self.gradients = torch.autograd.grad(self.outputs, self.leaves, self.doutputs)
        self.outputs = None

    def stages(self) -> Stages:
        """The timed parts in order."""
        return ("forward", self.forward), ("backward", self.backward)

    def run(self) -> dict[str, float]:
        """Seconds of forward, backward and both."""
        # Two runs' gradients at once would be memory that no single run needs.
        seconds = timed(self.clock, self.stages(), self.total, self.clear)
        self.clear()
        return seconds

    def results(self) -> Results:
        """Outputs and the gradients of every leaf."""
        self.forward()
        outputs = self.outputs
        self.backward()
        results = outputs, self.gradients
        self.clear()
        return results

    def kept_bytes(self) -> int:
        """Bytes that the forward keeps for the backward, beside the inputs."""
        self.forward()
        assert self.outputs is not None
        found = Kept(self.inputs).add(self.outputs)
        self.clear()
        return found

    def holds(self) -> object:
        """What the stage that was just done has made."""
        return self.outputs if self.gradients is None else self.gradients

    def gathered(self, held: Sequence[object]) -> Results:
        """results() from what the stages have held."""
        outputs, gradients = held
        return outputs, gradients
