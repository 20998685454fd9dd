"""`gptkernels bench ops | train | scaling | plot | table`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.case import GPU_BACKENDS
from benchmarks.device import AS_IT_COMES, COLD, WARM
from benchmarks.gpu_table import gpu_markdown
from benchmarks.long_format import csv_text
from benchmarks.machine import describe
from benchmarks.op import DTYPES
from benchmarks.ops import OPS, bench_ops
from benchmarks.options import Options
from benchmarks.scaling import AXES, bench_scaling
from benchmarks.scaling import line as scaling_line
from benchmarks.tables import case_text, machine_line, read_object
from benchmarks.targets import markdown
from benchmarks.train_step import DEFAULT_CASES, SIZES, bench_train
from gptkernels.backend import BACKENDS
from gptkernels.static_table import CALLED
from model.config import preset_names
from model.files import make_ready, user_path, write_text

ROUNDS, QUICK_ROUNDS = 20, 8
BUDGETS = {"cpu": 600.0, "cuda": 10.0}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all of them."""
    parser = argparse.ArgumentParser(
        prog="gptkernels bench",
        description="How fast are our kernels, beside PyTorch written out, best eager PyTorch and torch.compile? Every "
        "column is compared with float64 before it is timed. Ends with one line of JSON; exit status 1 if a column is wrong.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="each operator, forward and backward")
    ops.add_argument("names", nargs="*", metavar="NAME", help=f"operators (default all): {', '.join(OPS)}")
    train = commands.add_parser("train", help="a whole training step: forward, backward, optimizer")
    train.add_argument(
        "--preset",
        dest="names",
        nargs="+",
        metavar="NAME",
        help=f"presets ({', '.join(preset_names())}), .toml files or sizes ({', '.join(SIZES)}); default "
        + ", ".join(f"on {device} {' '.join(names)}" for device, names in DEFAULT_CASES.items()),
    )
    train.add_argument(
        "--breakdown", action="store_true", help="also time and saved bytes of each operator in the step"
    )
    scaling = commands.add_parser("scaling", help="cost of operators against a size of the work, or threads")
    scaling.add_argument("names", nargs="*", metavar="AXIS", help=f"axes (default all): {', '.join(AXES)}")
    for command in (ops, train, scaling):
        add_options(command)
    written = commands.add_parser(
        "generate", help="tokens a second of a model that writes, on a CPU in fp32, with torchao's 8 bits"
    )
    written.add_argument(
        "name", nargs="?", default="shakespeare-cpu", help="a preset or a run (default shakespeare-cpu)"
    )
    written.add_argument("--prompt", type=int, default=16, help="tokens of the text before (default 16)")
    written.add_argument("--tokens", type=int, default=40, help="tokens to write (default 40)")
    written.add_argument("--rounds", type=int, default=5, help="default 5")
    written.add_argument("--backend", default="auto", help="backend of ours (default auto)")
    written.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    plot = commands.add_parser(
        "plot", help="pictures (PNG and SVG) of results: roofline, speed-ups, cost against sizes, loss against time"
    )
    plot.add_argument(
        "files", nargs="+", type=user_path, metavar="FILE", help="JSON of bench --out, or a run's result.json"
    )
    plot.add_argument("--out", type=user_path, default=Path("docs"), metavar="FOLDER", help="default docs")
    table = commands.add_parser("table", help="the README's table from committed results")
    table.add_argument(
        "files", nargs="+", type=user_path, metavar="FILE", help="JSON of bench --out, of check, or a run's result.json"
    )
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that what measures has in common."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where torch finds a GPU"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="a training step's 16-bit types are autocast; default fp32 on a CPU, bf16 on a GPU; fp16 only there",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="backend of ours; auto is the fastest on a CPU, and a column each of triton and cuda on a GPU",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="to time one case: each column may take an equal part of it, and one whose runs are too slow for that is in "
        "fewer rounds, at least in one; its CUDA graphs may take as much again "
        f"(default {BUDGETS['cpu']:g}, on a GPU {BUDGETS['cuda']:g})",
    )
    parser.add_argument(
        "--cache",
        choices=(COLD, WARM, AS_IT_COMES),
        help="before each run: overwrite the caches, or do the work once untimed, or neither; default neither on a CPU, "
        "cold on a GPU",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, small shapes of operators, no memory")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FILE.json",
        help="write the JSON to a file too, and FILE.csv beside it, after every case",
    )


def options_of(args: argparse.Namespace) -> Options:
    """The choices as the cases take them."""
    return Options(
        device=args.device,
        dtype=args.dtype or ("fp32" if args.device == "cpu" else "bf16"),
        backend=args.backend,
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        budget=args.budget or BUDGETS[args.device],
        quick=args.quick,
        cache=args.cache or (AS_IT_COMES if args.device == "cpu" else COLD),
        compile=not args.no_compile,
        memory=not (args.no_memory or args.quick),
        breakdown=args.command == "train" and args.breakdown,
    )


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message unless the numbers that count or last are positive."""
    for name in ("threads", "rounds", "budget"):
        value = getattr(args, name, None)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}: leave it out for the default")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a usage error where a value makes no sense; put the device and the names where they were left open."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use: `gptkernels doctor` shows what it finds")
    if args.device == "cpu" and args.dtype == "fp16":
        parser.error("--dtype fp16 needs --device cuda: the kernels for CPUs have float32 and bfloat16")
    if args.device == "cuda" and args.backend not in ("auto", *GPU_BACKENDS):
        parser.error(
            f"--backend must be auto or one of {', '.join(GPU_BACKENDS)} with --device cuda, got {args.backend}"
        )
    if args.command == "train":
        args.names = args.names or list(DEFAULT_CASES[args.device])
    if args.command in ("ops", "scaling"):
        known = (
            list(OPS) if args.command == "ops" else [axis for axis in AXES if args.device == "cpu" or axis != "threads"]
        )
        args.names = [CALLED.get(name, name) for name in args.names] or known
        for name in args.names:
            if name not in known:
                parser.error(f"bench {args.command} has no {name!r}: choose {', '.join(known)}")
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {args.out}: the same figures as CSV are written beside it")


def main(argv: Sequence[str]) -> int:
    """Measure and show, or render a table; 1 if a column was wrong."""
    parser = make_parser()
    args = parser.parse_args(list(argv))
    if args.command == "table":
        files = [read_result(file) for file in args.files]
        of_gpus = [file for file in files if file.get("device") == "cuda" and file.get("what") != "scaling"]
        if len(files) > len(of_gpus):
            print(markdown(files))
        if of_gpus:
            print(gpu_markdown(of_gpus))
        return 0
    if args.command == "plot":
        from benchmarks.plot import plot  # matplotlib is an extra

        for path in plot(args.files, args.out):
            print(path)
        return 0
    if args.command != "generate":
        check_arguments(parser, args)
    check_numbers(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "generate":
        return generate_command(args)
    options = options_of(args)
    measure = {"ops": bench_ops, "train": bench_train, "scaling": bench_scaling}[args.command]
    return run(args.command, measure(args.names, options), options, args.out)


def generate_command(args: argparse.Namespace) -> int:
    """`bench generate`."""
    from benchmarks.generate import bench_generate, generate_text

    machine = describe("cpu")
    print(f"bench generate, cpu, fp32: {machine_line(machine)}\n", flush=True)
    result = bench_generate(args.name, args.prompt, args.tokens, args.rounds, args.backend)
    print(f"{generate_text(result)}\n\n{json.dumps(result | {'machine': machine}, allow_nan=False)}")
    return 0 if result["passed"] else 1


def read_result(file: Path) -> dict:
    """A file that `bench table` takes; ValueError for any other."""
    wanted = "JSON of bench --out, of check, or a run's result.json"
    content = read_object(file, wanted)
    if content.get("command") not in ("bench", "check") and "train_seconds" not in content:
        raise ValueError(f"{file} must be {wanted}, got something else")
    return content


def run(what: str, cases: Iterator[dict[str, object]], options: Options, out: Path | None) -> int:
    """Show every case as it is done, then all of them as JSON."""
    machine = describe(options.device)
    result: dict[str, object] = {"command": "bench", "what": what, "machine": machine, "device": options.device}
    result["quick"] = options.quick
    if out is not None:  # what cannot be written is said before the work
        make_ready(out)
    print(f"bench {what}, {options.device}, {options.dtype}: {machine_line(machine)}", flush=True)
    done: list[dict[str, object]] = []
    for case in cases:
        print(scaling_line(case) if what == "scaling" else f"\n{case_text(case)}", flush=True)
        done.append(case)
        result |= {"cases": done, "passed": all(case["passed"] for case in done)}
        if out is not None:
            write_text(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
            write_text(out.with_suffix(".csv"), csv_text(result))
    print(f"\n{json.dumps(result, allow_nan=False)}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
