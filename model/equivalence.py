"""`gptkernels check`: is the fast model the same function as the reference?

Both models run on the same weights and the same tokens, and both are measured against the reference in float64: the
logits, the loss, the gradient of every parameter, and the losses of a number of training steps. What the fast model
may be wrong by is set by what plain PyTorch is wrong by in the same dtype; see model/equivalence_rule.py.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import holds_run, load_model
from model.config import Config, resolve
from model.data import load_dataset, random_batch
from model.equivalence_report import json_line, sentence, table
from model.equivalence_rule import Row, compare, pooled
from model.fast import FastGPT, Model
from model.optimize import make_optimizer
from model.reference import GPT
from model.report import describe_backends
from model.usage import Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Three batches, so that a quantity of one number (the loss) is not judged by the luck of one rounding.
BATCHES = 3
# A preset does not know the vocabulary of its text; tiny Shakespeare's is this.
CHARACTERS = 65
# As wide as the initial weights: at the initial values themselves, zero and one, a bias or gain that is left out
# would change nothing.
JITTER = 0.02

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Models:
    """The three versions of one model: equal weights, no shared tensors, so that each can be trained by itself."""

    ours: FastGPT
    plain: GPT
    oracle: GPT

    @classmethod
    def of(cls, weights: GPT, backend: str) -> Models:
        """Around copies of a reference's weights, all in train mode."""
        plain, shared = copy.deepcopy(weights).train(), copy.deepcopy(weights).train()
        ours = FastGPT.from_reference(shared, backend=backend).train()
        return cls(ours, plain, copy.deepcopy(weights).double().train())


def run_forward(model: Model, batch: Batch, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """(logits, loss) of a batch; bf16 is autocast over fp32 weights, and a float64 model is left alone."""
    options = {"return_logits": True} if isinstance(model, FastGPT) else {}
    bf16 = dtype is torch.bfloat16 and next(model.parameters()).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits, loss = model(*batch, seed=seed, **options)
    return logits, loss


def outcome(model: Model, batch: Batch, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    logits, loss = run_forward(model, batch, dtype, seed)
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        # A parameter that no gradient reached is a finding, not an exception: NaN fails the rule by itself.
        gradients[f"grad {name}"] = torch.full_like(p, math.nan) if p.grad is None else p.grad.detach()
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def compare_outcomes(models: Models, batches: Sequence[Batch], dtype: torch.dtype, seed: int) -> list[Row]:
    """Logits, loss and every gradient, each over all the batches."""
    rows: dict[str, list[Row]] = {}
    for i, batch in enumerate(batches):
        ours, plain, oracle = (
            outcome(model, batch, dtype, seed + i) for model in (models.ours, models.plain, models.oracle)
        )
        for name, right in oracle.items():
            rows.setdefault(name, []).append(compare(name, ours[name], plain[name], right, dtype=dtype))
    return [pooled(of_quantity, dtype) for of_quantity in rows.values()]


def training_losses(model: Model, batches: Sequence[Batch], dtype: torch.dtype, config: Config, seed: int) -> Tensor:
    """The loss before each of the steps, with the preset's optimizer at its full learning rate."""
    optimizer = make_optimizer(model, config)
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        _, loss = run_forward(model, batch, dtype, seed + i)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip or math.inf)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses) if losses else torch.empty(0, dtype=torch.float64)


def compare_training(models: Models, batches: Sequence[Batch], dtype: torch.dtype, config: Config, seed: int) -> Row:
    """The losses of len(batches) training steps: the three models trained apart on the same batches."""
    ours, plain, oracle = (
        training_losses(model, batches, dtype, config, seed) for model in (models.ours, models.plain, models.oracle)
    )
    return compare(f"losses of {len(batches)} steps", ours, plain, oracle, dtype=dtype)


@dataclass(frozen=True)
class Subject:
    """What is checked: a configuration, a model with its weights, the tokens, and words for all of that."""

    name: str
    config: Config
    weights: GPT
    tokens: Tensor
    description: str


def subject(name: str, overrides: Sequence[str], seed: int) -> Subject:
    """A run folder's trained model on its text, or a preset's fresh model on random tokens."""
    if holds_run(Path(name)):
        if overrides:
            raise ValueError(f"a run has its own settings, got {overrides[0]!r} for {name}: leave it out")
        model, tokenizer, config = load_model(name)
        weights = model.to_reference() if isinstance(model, FastGPT) else model
        dataset = load_dataset(config.train.data, config.train.val_fraction, config.model.context, tokenizer)
        return Subject(name, config, weights, dataset.train, f"trained weights, text: {dataset.source}")
    config, _ = resolve(name, list(overrides))
    if not config.model.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=CHARACTERS))
    torch.manual_seed(seed)
    weights = GPT(config.model)
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(JITTER * torch.randn_like(p))
    windows = 4 * config.train.batch * (config.model.context + 1)
    tokens = torch.randint(config.model.vocab_size, (windows,))
    return Subject(name, config, weights, tokens, f"fresh weights, random tokens, seed {seed}")


def check(what: Subject, *, steps: int, backend: str, dtype: torch.dtype, seed: int) -> list[Row]:
    """Every row of the comparison."""
    models = Models.of(what.weights, backend)
    batches = [
        random_batch(what.tokens, what.config.train.batch, what.config.model.context, seed, i)
        for i in range(max(steps, BATCHES))
    ]
    rows = compare_outcomes(models, batches[:BATCHES], dtype, seed)
    if steps:
        rows.append(compare_training(models, batches[:steps], dtype, what.config, seed))
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `check`."""
    parser = Parser(
        prog="gptkernels check",
        usage="gptkernels check [PRESET | RUN] [key=value ...] [options]",
        description="Is the fast model the same function as the reference? Logits, loss, every gradient and some training"
        " steps are compared; the fast model may err twice as much against float64 as plain PyTorch does.",
        epilog="exit status: 0 the same function, 1 another one, 2 it could not be checked",
    )
    parser.add_argument(
        "words", nargs="*", help="a preset with settings as in train, or a run folder (shakespeare-cpu)"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps to compare (default 20)")
    parser.add_argument("--backend", default="auto", help="backend of the fast model (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and dropout (default 0)")
    parser.add_argument("--all", action="store_true", help="show every gradient, not only the worst")
    args, later = parser.parse_known_args(argv)  # argparse leaves words over that follow an option
    if unknown := [word for word in later if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    words = [*args.words, *later]
    args.overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word] or ["shakespeare-cpu"]
    if len(names) > 1:
        parser.error(f"one preset or run, got {' and '.join(names)}")
    if args.steps < 0:
        parser.error(f"--steps must not be negative, got {args.steps}")
    args.name = names[0]
    return args


def main(argv: list[str]) -> int:
    """`gptkernels check`: a table, a sentence, and one line of JSON; 1 if any row fails."""
    args = parse(argv)
    what, dtype = subject(args.name, args.overrides, args.seed), DTYPES[args.dtype]
    backends = FastGPT.from_reference(what.weights, backend=args.backend).backends(dtype)
    print(f"check {' '.join([what.name, *args.overrides])}, {args.dtype}: {what.description}")
    print(f"backend {args.backend}: {describe_backends(backends)}\n", flush=True)
    rows = check(what, steps=args.steps, backend=args.backend, dtype=dtype, seed=args.seed)
    print(table(rows, show_all=args.all))
    print(f"\n{sentence(rows)}")
    settings = {name: getattr(args, name) for name in ("name", "overrides", "dtype", "backend", "seed", "steps")}
    print(json_line(rows, settings | {"backends": backends, "data": what.description}))
    return 0 if all(row.passed for row in rows) else 1
