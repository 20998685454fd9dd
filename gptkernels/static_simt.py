"""What csrc/simt counts while it runs the CUDA kernels forward and backward on small tensors: no time, but exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptkernels import causal_attention, gelu_mlp, layer_norm, linear, linear_cross_entropy, simt

Make = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Counts:
    """One kernel in all launches of one case; instructions are a warp's."""

    op: str
    size: str
    dtype: str
    kernel: str
    launches: int
    warps: int
    shared: int  # bytes of a block
    mma: int
    wavefronts: int  # passes through the banks of shared memory
    conflicts: int  # of them, those that the banks' order costs
    sectors: int  # 32-byte pieces of global memory that instructions touch
    ideal_sectors: int  # what their bytes fill

    @property
    def excess(self) -> float:
        """Sectors touched over the ideal."""
        return self.sectors / self.ideal_sectors if self.ideal_sectors else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "excess": self.excess}


def table(op: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> Iterator[Counts]:
    """Every kernel of the operators with `op` in their name, case by case. Raises what breaks a rule of csrc/simt."""
    if not any(op in name for name, _, _ in cases()):
        raise ValueError(f"no kernels of an operator called {op!r}")
    for name, size, call in cases():
        for dtype in dtypes if op in name else ():
            yield from counted(name, size, dtype, call)


def cases() -> Iterator[tuple[str, str, Callable[[Make], Any]]]:
    """(operator, size, a call on tensors from `make`)."""
    for D in (64, 128):
        yield "attention", f"T=256 D={D}", partial(attention, D)
    yield "layer_norm", "64x768", norm
    yield "linear", "128x256 -> 384", product
    yield "mlp", "128x256 -> 512", mlp
    yield "cross_entropy", "64x64 V=1024", loss


def attention(D: int, make: Make) -> Any:
    return causal_attention(make(1, 1, 256, D), make(1, 1, 256, D), make(1, 1, 256, D), backend="simt")


def norm(make: Make) -> Any:
    return layer_norm(make(64, 768), make(768), make(768), residual=make(64, 768), backend="simt")


def product(make: Make) -> Any:
    return linear(make(128, 256), make(384, 256), make(384), backend="simt")


def mlp(make: Make) -> Any:
    return gelu_mlp(make(128, 256), make(512, 256), make(512), make(256, 512), make(256), backend="simt")


def loss(make: Make) -> Any:
    targets = torch.arange(64) * 13 % 1024
    return linear_cross_entropy(make(64, 64), make(1024, 64), targets, backend="simt")


def counted(op: str, size: str, dtype: torch.dtype, call: Callable[[Make], Any]) -> list[Counts]:
    """The kernels of one call and of its gradients."""
    random = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype).requires_grad_()

    with simt.recording() as report:
        found = call(make)
        outputs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    name = str(dtype).removeprefix("torch.")
    return [counts_of(op, size, name, kernel, figures) for kernel, figures in report.kernels.items()]


def counts_of(op: str, size: str, dtype: str, kernel: str, figures: dict[str, Any]) -> Counts:
    classes = [counter for counter in figures.values() if isinstance(counter, dict)]

    def total(what: str) -> int:
        return sum(counter.get(what, 0) for counter in classes)

    return Counts(
        op=op,
        size=size,
        dtype=dtype,
        kernel=kernel,
        launches=figures["launches"],
        warps=figures["warps"],
        shared=figures["shared_bytes"],
        mma=figures.get("mma", {}).get("instructions", 0),
        wavefronts=total("wavefronts"),
        conflicts=total("wavefronts") - total("ideal_wavefronts"),
        sectors=total("sectors"),
        ideal_sectors=total("ideal_sectors"),
    )
