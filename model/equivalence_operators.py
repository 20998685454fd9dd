"""The small levels of `check`: each operator and each block alone, on the inputs that it gets in this very model.

An operator's inputs are those of a forward on the plain operators (backend="reference"); ours, the plain one in the same
dtype and the plain one in float64 then take the same numbers and the same output gradients. A block's inputs are those
of the reference model's blocks, and its oracle is the reference's own block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gptkernels
from model.equivalence_levels import factor_of, run_forward
from model.equivalence_rule import GRADIENT_FACTOR, Row, compare, pooled
from model.equivalence_sites import ARGUMENTS, Operator, Site, as_it_is, block_sites, tapped
from model.equivalence_subject import Batch, Models
from model.fast import FastGPT
from model.reference import Seed, dropout_seed

GRADIENT = "grad of "
Tensors = dict[str, Tensor]


def on_reference(operator: Operator) -> Operator:
    """The operator with its plain PyTorch form, whatever backend the caller names."""
    return lambda *args, **kwargs: operator(*args, **{**kwargs, "backend": "reference"})


def is_floating(value: object) -> bool:
    """Whether it is a tensor that can have a gradient."""
    return isinstance(value, Tensor) and value.is_floating_point()


def output_gradient(y: Tensor, rng: torch.Generator) -> Tensor:
    """Normal numbers like y, of so few bits that they are the same in every dtype."""
    return torch.randn(y.shape, generator=rng).bfloat16().to(y.dtype)


def evaluate(
    site: Site, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype, seed: int
) -> Tensors:
    """Every output of a call and the gradient of every input, for output gradients drawn from the seed.

    The inputs are taken in float64 if dtype is that, else as they are.
    """
    double = dtype is torch.float64
    named = dict(zip(ARGUMENTS[site.operator], args, strict=False)) | kwargs
    leaves = {
        name: (value.detach().double() if double else value.detach()).requires_grad_()
        for name, value in named.items()
        if is_floating(value)
    }
    given = named | leaves
    positional = [given.pop(name) for name in ARGUMENTS[site.operator][: len(args)]]
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        result = operator(*positional, **given)
    outputs = result if isinstance(result, tuple) else (result,)
    rng = torch.Generator().manual_seed(seed)
    douts = [output_gradient(y, rng) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), douts, allow_unused=True)
    found = {name: y.detach() for name, y in zip(("output", "sum"), outputs, strict=False)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[GRADIENT + name] = torch.full_like(leaf, math.nan) if gradient is None else gradient
    return found


class OperatorProbe:
    """Looks at every operator call of a forward: a choice for `tapped` that changes nothing and notes the errors."""

    def __init__(self, models: Models, dtype: torch.dtype, seed: int) -> None:
        self.asked, self.choose = models.ours.asked, models.choose
        self.dtype, self.seed = dtype, seed
        self.rows: dict[tuple[Site, str], list[Row]] = {}

    def __call__(self, site: Site, operator: Operator) -> Operator:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.look(site, operator, args, kwargs)
            return operator(*args, **kwargs)

        return call

    def look(self, site: Site, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Compare ours with the plain operator at a site, on the inputs of the call."""
        with torch.autocast("cpu", enabled=False):
            ours_there, plain_there = self.choose(site, operator), on_reference(getattr(gptkernels, site.operator))
            ours_kwargs = {**kwargs, "backend": self.asked[site.operator.removesuffix("_packed")]}
            ours, again = (evaluate(site, ours_there, args, ours_kwargs, self.dtype, self.seed) for _ in range(2))
            plain = evaluate(site, plain_there, args, kwargs, self.dtype, self.seed)
            exact = evaluate(site, plain_there, args, kwargs, torch.float64, self.seed)
        for name, right in exact.items():
            row = compare(
                f"{site.name} {site.operator}: {name}",
                ours[name],
                plain[name],
                right,
                dtype=self.dtype,
                level="operator",
                again=again[name],
            )
            self.rows.setdefault((site, name), []).append(row)

    def pooled(self) -> dict[tuple[Site, str], Row]:
        """One row for each result of each site."""
        return {
            (site, name): pooled(rows, self.dtype, GRADIENT_FACTOR if name.startswith(GRADIENT) else 2.0)
            for (site, name), rows in self.rows.items()
        }


def compare_operators(
    models: Models, batches: Sequence[Batch], dtype: torch.dtype, seed: int
) -> dict[tuple[Site, str], Row]:
    """Every output and input gradient of every operator call, each over all the batches."""
    probe = OperatorProbe(models, dtype, seed)
    walker = FastGPT.from_reference(models.plain, backend="reference")
    with torch.no_grad():
        for i, batch in enumerate(batches):
            probe.seed = seed + i
            run_forward(walker, batch, dtype, seed + i, probe)
    return probe.pooled()


def fast_block(model: FastGPT, layer: int, x: Tensor, seed: Seed | None) -> Tensor:
    """A block as the fast model computes it, but for the last residual addition, which its next norm makes."""
    x, branch = model.block(layer, x, None, seed)
    return x + branch


def block_result(
    models: Models, which: str, layer: int, x: Tensor, seed: Seed | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and input gradient of one block in one of the three models."""
    leaf = (x.double() if which == "oracle" else x.float()).detach().requires_grad_()
    bf16 = dtype is torch.bfloat16 and which != "oracle"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        if which == "ours":
            with tapped(block_sites(layer), models.choose):
                y = fast_block(models.ours, layer, leaf, seed)
        else:
            y = getattr(models, which).transformer.h[layer](leaf, seed)
    rng = torch.Generator().manual_seed(layer)
    return y.detach(), torch.autograd.grad(y, leaf, output_gradient(y, rng))[0]


def compare_blocks(models: Models, batches: Sequence[Batch], dtype: torch.dtype, seed: int) -> list[Row]:
    """Output and input gradient of every block, each over all the batches."""
    rows: dict[str, list[Row]] = {}
    config = models.oracle.config
    for i, batch in enumerate(batches):
        inputs: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].detach()))
            for block in models.plain.transformer.h
        ]
        with torch.no_grad():
            run_forward(models.plain, batch, dtype, seed + i, as_it_is)
        for hook in hooks:
            hook.remove()
        used = dropout_seed(config.dropout, True, seed + i)
        for layer, x in enumerate(inputs):
            ours, again, plain, exact = (
                block_result(models, which, layer, x, used, dtype) for which in ("ours", "ours", "plain", "oracle")
            )
            for part, name in enumerate((f"block {layer} output", f"grad of block {layer} input")):
                versions = (found[part] for found in (ours, plain, exact))
                row = compare(name, *versions, dtype=dtype, level="block", again=again[part])
                rows.setdefault(name, []).append(row)
    return [pooled(of_quantity, dtype, factor_of(name)) for name, of_quantity in rows.items()]
