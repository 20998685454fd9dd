"""The levels of `check` that take the whole model: logits, loss, every gradient, one optimizer step, generated tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from model.config import Config
from model.equivalence_rule import FACTOR, GRADIENT_FACTOR, Row, compare, pooled
from model.equivalence_sites import Choice, as_it_is, forward_sites, tapped
from model.equivalence_subject import Batch, Models
from model.fast import FastGPT, Model
from model.generate import generate
from model.optimize import make_optimizer
from model.reference import GPT

GRADIENT = "grad "


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
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def level_of(quantity: str) -> str:
    """The level of one of outcome's quantities."""
    return "gradient" if quantity.startswith(GRADIENT) else quantity


def factor_of(quantity: str) -> float:
    """How many times plain PyTorch's error it may have."""
    return GRADIENT_FACTOR if quantity.startswith(GRADIENT) else FACTOR


def compare_outcomes(models: Models, batches: Sequence[Batch], dtype: torch.dtype, seed: int) -> list[Row]:
    """Logits, loss and every gradient, each over all the batches; ours are computed twice."""
    rows: dict[str, list[Row]] = {}
    for i, batch in enumerate(batches):
        first, again = (outcome(models.ours, batch, dtype, seed + i, models.choose) for _ in range(2))
        plain, oracle = (outcome(model, batch, dtype, seed + i) for model in (models.plain, models.oracle))
        for name, right in oracle.items():
            row = compare(name, first[name], plain[name], right, dtype=dtype, level=level_of(name), again=again[name])
            rows.setdefault(name, []).append(row)
    return [pooled(of_quantity, dtype, factor_of(name)) for name, of_quantity in rows.items()]


def stepped(model: Model, gradients: Mapping[str, Tensor], config: Config, norm: float = 0.0) -> Tensor:
    """All weights, in one row, after a step of the configuration's optimizer from the model's, which stay as they are.

    norm is the gradients' norm as clipping sees it, if not their own.
    """
    moved = copy.deepcopy(model)
    for name, p in moved.named_parameters():
        p.grad = gradients[GRADIENT + name].clone()
    if config.train.clip:
        size = torch.tensor(norm or total_norm(gradients), dtype=torch.float64)
        torch.nn.utils.clip_grads_with_norm_(moved.parameters(), config.train.clip, size)
    make_optimizer(moved, config).step()
    return torch.cat([p.detach().flatten() for p in moved.parameters()])


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
    """
    ours, again = (outcome(models.ours, batch, dtype, seed, models.choose) for _ in range(2))
    plain, exact = (outcome(model, batch, dtype, seed) for model in (models.plain, models.oracle))
    before = torch.cat([p.detach().flatten() for p in models.oracle.parameters()])
    after = stepped(models.oracle, exact, config)
    allowed = torch.finfo(torch.float32).eps * (1.5 * after.abs() + 7 * (after - before).abs())
    slack = {row.quantity: row.allowed for row in rows}
    ends = [
        stepped(models.oracle, {name: g + sign * slack[name] for name, g in exact.items()}, config, total_norm(exact))
        for sign in (1.0, -1.0)
    ]
    return compare(
        "weights after one step",
        stepped(models.ours, ours, config),
        stepped(models.plain, plain, config),
        after,
        dtype=torch.float32,  # that of the weights, whatever the arithmetic is
        level="step",
        again=stepped(models.ours, again, config),
        allowed=allowed + torch.stack([(end - after).abs() for end in ends]).amax(0),
    )


def greedy(model: Model, prompt: Tensor, tokens: int, dtype: torch.dtype, choose: Choice = as_it_is) -> list[int]:
    """The likeliest tokens one after the other, as the model itself goes on."""
    ours = isinstance(model, FastGPT)
    bf16 = dtype is torch.bfloat16 and next(model.parameters()).dtype is torch.float32
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        tapped(forward_sites(model.config, with_loss=False), choose) if ours else nullcontext(),
    ):
        return list(generate(model, prompt, tokens, temperature=0.0))


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
