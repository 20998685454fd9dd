"""The levels of `check` that take the whole model: logits, loss, every gradient, one optimizer step, generated tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from model.config import Config
from model.equivalence_rule import FACTOR, GRADIENT_FACTOR, Row, compare, nearest, pooled
from model.equivalence_sites import Choice, as_it_is, forward_sites, tapped
from model.equivalence_subject import Batch, Models
from model.fast import FastGPT, Model
from model.generate import generate
from model.optimize import make_optimizer
from model.reference import GPT

GRADIENT = "grad "
STEP = "weights after one step"


def run_forward(
    model: Model, batch: Batch, dtype: torch.dtype, seed: int, choose: Choice = as_it_is
) -> tuple[Tensor, Tensor]:
    """(logits, loss) of a batch; bf16 is autocast over fp32 weights, and a float64 model is left alone."""
    ours = isinstance(model, FastGPT)
    bf16 = dtype is torch.bfloat16 and next(model.parameters()).dtype is torch.float32
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        tapped(forward_sites(model.config), choose) if ours else nullcontext(),
    ):
        logits, loss = model(*batch, seed=seed, **({"return_logits": True} if ours else {}))
    return logits, loss


def outcome(model: Model, batch: Batch, dtype: torch.dtype, seed: int, choose: Choice = as_it_is) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    logits, loss = run_forward(model, batch, dtype, seed, choose)
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        # A parameter that no gradient reached is a finding, not an exception: NaN fails the rule by itself.
        gradients[GRADIENT + name] = torch.full_like(p, math.nan) if p.grad is None else p.grad.detach()
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def level_of(quantity: str) -> str:
    """The level of one of outcome's quantities."""
    return "gradient" if quantity.startswith(GRADIENT) else quantity


def factor_of(quantity: str) -> float:
    """How many times plain PyTorch's error it may have."""
    return GRADIENT_FACTOR if quantity.startswith(GRADIENT) else FACTOR


def compare_outcomes(models: Models, batches: Sequence[Batch], dtype: torch.dtype, seed: int) -> list[Row]:
    """Logits, loss and every gradient, each over all the batches; ours are computed twice."""
    found = [outcome_rows(models, batch, dtype, seed + i) for i, batch in enumerate(batches)]
    return [pooled(rows, dtype, factor_of(rows[0].quantity)) for rows in zip(*found, strict=True)]


def outcome_rows(models: Models, batch: Batch, dtype: torch.dtype, seed: int) -> list[Row]:
    """Logits, loss and every gradient of one batch; their tensors are gone when it returns."""
    first, again, plain, oracle = outcomes(models, batch, dtype, seed)
    return [
        compare(name, first[name], plain[name], right, dtype=dtype, level=level_of(name), again=again[name])
        for name, right in oracle.items()
    ]


def outcomes(models: Models, batch: Batch, dtype: torch.dtype, seed: int) -> list[dict[str, Tensor]]:
    """What ours gives, twice, plain PyTorch and float64."""
    ours = [outcome(models.ours, batch, dtype, seed, models.choose) for _ in range(2)]
    return ours + [outcome(model, batch, dtype, seed) for model in (models.plain, models.oracle)]


def stepped(weight: Tensor, gradient: Tensor, config: Config, norm: float) -> Tensor:
    """A parameter after a step of the configuration's optimizer; norm is all gradients' as clipping sees it."""
    alone = torch.nn.Module()
    alone.weight = torch.nn.Parameter(weight.detach().clone())
    alone.weight.grad = gradient.clone()
    if config.train.clip:
        torch.nn.utils.clip_grads_with_norm_([alone.weight], config.train.clip, torch.tensor(norm, dtype=torch.float64))
    make_optimizer(alone, config).step()
    return alone.weight.detach()


def total_norm(found: Mapping[str, Tensor]) -> float:
    """The norm of all gradients of an outcome."""
    return float(torch.nn.utils.get_total_norm([g for name, g in found.items() if name.startswith(GRADIENT)]))


def compare_step(
    models: Models, batch: Batch, dtype: torch.dtype, config: Config, seed: int, rows: Sequence[Row]
) -> Row:
    """All weights after one optimizer step from the common ones; rows hold the gradients' allowed errors.

    AdamW's first step moves a weight by lr g / (|g| + 1e-8): where a gradient is nearly nothing its rounding error decides
    the direction, and no factor over plain PyTorch's error would tell luck from fault. So the allowance is what the same
    formula makes of the gradient's: each weight may lie as far from the exact one as the exact step would move if its
    gradient were off by the allowed error, up or down, plus the roundings of the step itself, half a unit in the last place
    each: three of the weight (factor of the decay, product, sum), fourteen of its move (two moments, a square, a root, a
    sum, two quotients, a product, and the constants in them).

    AdamW moves each parameter by itself: one after the other needs an eighth of the memory.
    """
    found = outcomes(models, batch, dtype, seed)
    norms = [total_norm(one) for one in found]
    slack = {row.quantity: row.allowed for row in rows}
    of_parameters = []
    for name, before in models.oracle.named_parameters():
        gradients, common = [one[GRADIENT + name] for one in found], models.plain.get_parameter(name)
        ours, again, plain = (
            stepped(common, g, config, norm) for g, norm in zip(gradients[:3], norms[:3], strict=True)
        )
        exact, norm = gradients[3], norms[3]
        after = stepped(before, exact, config, norm)
        moved = [
            (stepped(before, exact + end, config, norm) - after).abs()
            for end in (slack[GRADIENT + name], -slack[GRADIENT + name])
        ]
        rounding = torch.finfo(torch.float32).eps * (1.5 * after.abs() + 7 * (after - before.detach()).abs())
        allowed = rounding + torch.maximum(*moved)
        # float32 is the dtype of the weights, whatever the arithmetic is.
        row = compare(STEP, ours, plain, after, dtype=torch.float32, level="step", again=again, allowed=allowed)
        of_parameters.append(row)
    return nearest(of_parameters)


def greedy(model: Model, prompt: Tensor, tokens: int, dtype: torch.dtype, choose: Choice = as_it_is) -> list[int]:
    """The likeliest tokens one after the other, as the model itself goes on: ours by keeping keys and values.

    Where other operators are put in the place of ours it is every token's whole forward that calls them.
    """
    other = isinstance(model, FastGPT) and choose is not as_it_is
    bf16 = dtype is torch.bfloat16 and next(model.parameters()).dtype is torch.float32
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        tapped(forward_sites(model.config, with_loss=False), choose) if other else nullcontext(),
    ):
        return list(generate(model, prompt, tokens, temperature=0.0, keep=not other))


@torch.no_grad()
def shortfall(oracle: GPT, prompt: Tensor, tokens: Sequence[int]) -> Tensor:
    """For each token, how far its exact logit lies below the best one after the same beginning; 0 for the right token."""
    oracle.eval()
    text, start = torch.cat((prompt, torch.tensor(tokens))), len(prompt)
    found = []
    for place, token in enumerate(tokens, start):
        logits = oracle(text[:place][None, -oracle.config.context :])[0][0, -1]
        found.append(logits.max() - logits[token])
    oracle.train()
    return torch.stack(found)


def compare_tokens(models: Models, prompt: Tensor, tokens: int, dtype: torch.dtype, rows: Sequence[Row]) -> Row:
    """Greedy text: what a token other than float64's costs in exact logits. rows hold the logits' allowed error.

    A token chosen by logits that are each off by at most a can be short of the best by 2a; a larger loss is no tie.
    """
    ours, again = (greedy(models.ours, prompt, tokens, dtype, models.choose) for _ in range(2))
    short = shortfall(models.oracle, prompt, ours)
    plain = shortfall(models.oracle, prompt, greedy(models.plain, prompt, tokens, dtype))
    logits = next(row for row in rows if row.quantity == "logits")
    return Row(
        f"{tokens} greedy tokens",
        short.max().item(),
        plain.max().item(),
        logits.magnitude,
        2 * logits.allowed,
        "tokens",
        rms=short.square().mean().sqrt().item(),
        reference_rms=plain.square().mean().sqrt().item(),
        repeats=ours == again,
    )
