"""`gptkernels check`: is the fast model the same function as the reference?

Both run on the same weights and the same tokens, and both are measured against the reference in float64. What the fast
model may be wrong by is set by what plain PyTorch is wrong by in the same dtype. The parts:

    equivalence_rule       what an error may be, and the figures of one comparison
    equivalence_subject    what is compared: a preset, a run folder, or a state_dict file
    equivalence_sites      where the fast model calls an operator, and how to put another function there
    equivalence_operators  each operator and each block alone
    equivalence_levels     the whole model: logits, loss, gradients, an optimizer step, greedy text
    equivalence_band       training: is this drift normal?
    equivalence_bisect     --bisect: the first operator, layer and step where the two part
    equivalence_faults     known bugs, and equivalence_sabotage: --sabotage, the proof that check catches them
    equivalence_report     the table, the closing sentence, the JSON line
    equivalence_page       --report: one HTML page, with pictures by model/chart.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch

from model.equivalence_band import RUNS, Band, measure_band
from model.equivalence_levels import compare_outcomes, compare_step, compare_tokens
from model.equivalence_operators import compare_blocks, compare_operators
from model.equivalence_report import json_line, sentence, table
from model.equivalence_rule import Row
from model.equivalence_sites import Choice, as_it_is
from model.equivalence_subject import Models, Subject, subject
from model.fast import FastGPT
from model.report import describe_backends
from model.usage import Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Three batches, so that a quantity of one number (the loss) is not judged by the luck of one rounding.
BATCHES = 3
# Greedy text to compare, after a prompt of so many tokens.
TOKENS, PROMPT = 48, 8


@dataclass
class Result:
    """Every row of a comparison, and the training curves where there were steps."""

    rows: list[Row] = field(default_factory=list)
    band: Band | None = None

    @property
    def passed(self) -> bool:
        """Whether the fast model is the reference's function."""
        return all(row.passed for row in self.rows)


def compare_all(
    what: Subject,
    *,
    steps: int,
    backend: str,
    dtype: torch.dtype,
    seed: int,
    runs: int = RUNS,
    tokens: int = TOKENS,
    choose: Choice = as_it_is,
) -> Result:
    """Every level, from the operators to the generated text; the training is left out where there are no steps."""
    models = Models.of(what.weights, backend, choose)
    batches = what.batches(max(steps, BATCHES), seed)
    few = batches[:BATCHES]
    result = Result(list(compare_operators(models, few, dtype, seed).values()))
    result.rows += compare_blocks(models, few, dtype, seed)
    result.rows += compare_outcomes(models, few, dtype, seed)
    result.rows.append(compare_step(models, few[0], dtype, what.config, seed, result.rows))
    if steps:
        result.band = measure_band(models, batches[:steps], dtype, what.config, seed, runs)
        result.rows.append(result.band.row)
    prompt = what.tokens[: min(PROMPT, what.config.model.context)]
    result.rows.append(compare_tokens(models, prompt, tokens, dtype, result.rows))
    return result


def make_parser() -> Parser:
    """The parser of `check`."""
    parser = Parser(
        prog="gptkernels check",
        usage="gptkernels check [PRESET | RUN | FILE] [key=value ...] [options]",
        description="Is the fast model the same function as the reference? Operators, blocks, logits, loss, every gradient, an"
        " optimizer step, training and greedy text are compared; the fast model may err twice (in gradients three times) as"
        " much against float64 as plain PyTorch does.",
        epilog="exit status: 0 the same function, 1 another one, 2 it could not be checked",
    )
    parser.add_argument(
        "words",
        nargs="*",
        help="a preset with settings as in train, a run folder, or a state_dict file, .safetensors or torch.save's"
        " (shakespeare-cpu)",
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps to compare (default 20)")
    parser.add_argument("--backend", default="auto", help="backend of the fast model (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and dropout (default 0)")
    parser.add_argument("--band", type=int, default=RUNS, metavar="K", help=f"nudged reference runs (default {RUNS})")
    parser.add_argument("--all", action="store_true", help="show every row, not only the worst of each level")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `check`."""
    parser = make_parser()
    args, later = parser.parse_known_args(argv)  # argparse leaves words over that follow an option
    if unknown := [word for word in later if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    words = [*args.words, *later]
    args.overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word] or ["shakespeare-cpu"]
    if len(names) > 1:
        parser.error(f"one preset, run or file, got {' and '.join(names)}")
    if args.steps < 0:
        parser.error(f"--steps must not be negative, got {args.steps}")
    if args.band < 1:
        parser.error(f"--band must be at least 1, got {args.band}")
    args.name = names[0]
    return args


def main(argv: list[str]) -> int:
    """`gptkernels check`: a table, a sentence, and one line of JSON; 1 if any row fails."""
    args = parse(argv)
    what, dtype = subject(args.name, args.overrides, args.seed), DTYPES[args.dtype]
    backends = FastGPT.from_reference(what.weights, backend=args.backend).backends(dtype)
    print(f"check {' '.join([what.name, *args.overrides])}, {args.dtype}: {what.description}")
    print(f"backend {args.backend}: {describe_backends(backends)}\n", flush=True)
    result = compare_all(what, steps=args.steps, backend=args.backend, dtype=dtype, seed=args.seed, runs=args.band)
    print(table(result.rows, show_all=args.all))
    if result.band:
        print(f"\n{result.band.sentence()}")
    print(f"\n{sentence(result.rows)}")
    settings = {name: getattr(args, name) for name in ("name", "overrides", "dtype", "backend", "seed", "steps")}
    figures = {"backends": backends, "data": what.description, "band": result.band and result.band.figures()}
    print(json_line(result.rows, settings | figures))
    return 0 if result.passed else 1
