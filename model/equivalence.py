"""`gptkernels check`: is the fast model the same function as the reference?

Both run on the same weights and the same tokens, and both are measured against the reference in float64. What the fast
model may be wrong by is set by what plain PyTorch is wrong by in the same dtype. The parts:

    equivalence_rule       what an error may be, and the figures of one comparison
    equivalence_subject    what is compared: a preset, a run folder, or a state_dict file
    equivalence_sites      where the fast model calls an operator, and how to put another function there
    equivalence_operators  each operator and each block alone
    equivalence_levels     the whole model: logits, loss, gradients, an optimizer step, greedy text
    equivalence_band       training: is this drift normal?
    equivalence_run        all of these, one after the other
    equivalence_bisect     --bisect: the first operator, layer and step where the two part
    equivalence_faults     known bugs, and equivalence_sabotage: --sabotage, the proof that check catches them
    equivalence_report     the table, the closing sentence, the JSON line
    equivalence_page       --report: one HTML page, with pictures by model/chart.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.equivalence_band import RUNS
from model.equivalence_bisect import HEADER as SWAPS
from model.equivalence_bisect import Bisection, bisect
from model.equivalence_page import check_page
from model.equivalence_report import aligned, json_line, sentence, table
from model.equivalence_run import Result, compare_all
from model.equivalence_sabotage import sabotage_sentence, sabotage_table, trials
from model.equivalence_subject import Subject, subject
from model.fast import FastGPT
from model.files import make_ready, user_path, write_text
from model.machine import processor_name
from model.progress import Whereabouts
from model.report import count_parameters, describe_backends
from model.usage import Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT = "shakespeare-cpu"
# Settings of a training that would change nothing here, and what does.
ELSEWHERE = {
    **{key: f"check takes it as --{key}" for key in ("backend", "dtype", "seed", "steps")},
    **dict.fromkeys(("model", "device", "compile"), "check compares both models, on the CPU, as they are written"),
}
# What goes with --sabotage, and the words that are counted apart.
ALONE = ("sabotage", "backend", "words", "overrides")
# From so many parameters on a level takes minutes, and each is announced.
SLOW_PARAMETERS = 10_000_000


COLUMNS = """\
columns:
  max error, PyTorch's   the largest error of ours and of plain PyTorch in the same dtype, against float64
  ratio, rms ratio       of these two, and of the root mean squares of all errors
  ulp                    the median of our errors, in units in the last place of the exact values
  repeats                whether a second run gave the same bits
  allowed, used          how large the error may be, and how much of that it is"""


def make_parser() -> Parser:
    """The parser of `check`."""
    parser = Parser(
        prog="gptkernels check",
        usage="gptkernels check [PRESET | RUN | FILE] [key=value ...] [options]",
        description="Is the fast model the same function as the reference? Operators, blocks, logits, loss, every gradient,\n"
        "an optimizer step, training and greedy text are compared, on the CPU; the fast model may err twice (in\n"
        "gradients three times) as much against float64 as plain PyTorch does.",
        epilog=f"{COLUMNS}\n\nThe last line of stdout is one JSON object with every figure. Exit status: 0 the same function,\n"
        "1 another one, 2 it could not be checked.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        help="a preset with settings as in train, a run folder, or a state_dict file, .safetensors or torch.save's"
        " (shakespeare-cpu)",
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps to compare (default 20)")
    parser.add_argument(
        "--backend",
        default="auto",
        help="backend of the fast model, or one by operator, as in cpu,layer_norm:triton (default auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and dropout (default 0)")
    parser.add_argument("--band", type=int, default=RUNS, metavar="K", help=f"nudged reference runs (default {RUNS})")
    parser.add_argument(
        "--bisect", action="store_true", help="name the first step, layer and operator where the two part"
    )
    parser.add_argument(
        "--sabotage", action="store_true", help="plant known bugs in a small model: does check catch every one?"
    )
    parser.add_argument(
        "--report", type=user_path, metavar="FILE", help="write a page with pictures and tables too (.html)"
    )
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
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        parser.error(f"one preset, run or file, got {' and '.join(names)}")
    if args.report and args.report.suffix != ".html":
        parser.error(f"--report must end in .html, got {args.report}: it is a web page")
    if args.steps < 0:
        parser.error(f"--steps must not be negative, got {args.steps}")
    if args.band < 1:
        parser.error(f"--band must be at least 1, got {args.band}")
    for word in words:
        key = word.partition("=")[0].removeprefix("train.")
        if "=" in word and key in ELSEWHERE:
            parser.error(f"{word}: {ELSEWHERE[key]}")
    others = [name for name, value in vars(args).items() if value != parser.get_default(name) and name not in ALONE]
    if args.sabotage and (words or others):
        parser.error("--sabotage has its own model, in fp32, and bisects each bug: it goes with --backend alone")
    args.name = names[0] if names else DEFAULT
    return args


@dataclass(frozen=True)
class Comparison:
    """What `check` found, and words about what was compared."""

    result: Result
    found: Bisection | None
    about: list[tuple[str, str]]

    @property
    def passed(self) -> bool:
        """Whether the fast model is the reference's function, at every step that was looked at."""
        return self.result.passed and not (self.found and self.found.parted)


def main(argv: list[str]) -> int:
    """`gptkernels check`: a table, a sentence, and one line of JSON; 1 if the fast model is another function."""
    args = parse(argv)
    if args.sabotage:
        return sabotage(args.backend)
    return 0 if compare_and_show(args).passed else 1


def compare_and_show(args: argparse.Namespace) -> Comparison:
    """The comparison of the arguments, printed, and written as a page where one is asked for."""
    what, dtype = subject(args.name, args.overrides, args.seed), DTYPES[args.dtype]
    backends = FastGPT.from_reference(what.weights, backend=args.backend).backends(dtype)
    print(f"check {' '.join([what.name, *args.overrides])}, {args.dtype}: {what.description}")
    print(f"backend {args.backend}: {describe_backends(backends, 'cpu')}")
    if (trained := what.config.train.backend) not in ("auto", args.backend):
        print(f"its configuration trains with backend={trained}: --backend {trained} compares that one")
    print(flush=True)
    if args.report:  # what cannot be written is said before the work
        make_ready(args.report)
    slow = count_parameters(what.weights) >= SLOW_PARAMETERS
    say = Whereabouts(0.0) if slow else Whereabouts()
    result = compare_all(
        what, steps=args.steps, runs=args.band, backend=args.backend, dtype=dtype, seed=args.seed, say=say
    )
    print(table(result.rows, show_all=args.all))
    if result.band:
        print(f"\n{result.band.sentence()}")
    found = None
    if args.bisect:
        found = bisect(what, args.steps, backend=args.backend, dtype=dtype, seed=args.seed)
        print(f"\n{aligned([SWAPS, *found.cells()], words=2)}\n\n{found.sentence()}")
    print(f"\n{sentence(result.rows)}")
    comparison = Comparison(result, found, about(args, what, backends))
    if args.report:
        write_text(args.report, check_page(f"Is it equal? {what.name}", result, comparison.about, found))
        print(f"the report: {args.report}")
    settings = {name: getattr(args, name) for name in ("name", "overrides", "dtype", "backend", "seed", "steps")}
    figures = {
        "backends": backends,
        "data": what.description,
        "band": result.band and result.band.figures(),
        "bisect": found and found.figures(),
    }
    print(json_line(result.rows, settings | figures))
    return comparison


def about(args: argparse.Namespace, what: Subject, backends: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a page says of the comparison: what was compared, with what, where and how to repeat it."""
    m, threads = what.config.model, torch.get_num_threads()
    size = f"{m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, {what.config.train.batch} x {m.context} tokens"
    command = ["gptkernels", "check", args.name, *args.overrides, "--dtype", args.dtype, "--backend", args.backend]
    return [
        ("model", f"{size}; {what.description}"),
        ("arithmetic", f"{args.dtype}; {describe_backends(backends, 'cpu')}"),
        ("machine", f"{processor_name()}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"),
        ("again with", shlex.join([*command, "--steps", str(args.steps), "--seed", str(args.seed)])),
        ("written", time.strftime("%Y-%m-%d %H:%M")),
    ]


def sabotage(backend: str) -> int:
    """Plant every known bug; 1 if one escapes, or if the model without any does not pass."""
    print("check --sabotage: known bugs, one at a time, in one operator call of a small model\n", flush=True)
    done = list(trials(backend))
    print(f"{sabotage_table(done)}\n\n{sabotage_sentence(done)}")
    passed = all(one.passed for one in done)
    result = {
        "command": "check --sabotage",
        "sabotage": [one.figures() for one in done],
        "backend": backend,
        "passed": passed,
    }
    print(json.dumps(result, allow_nan=False))
    return 0 if passed else 1
