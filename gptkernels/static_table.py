"""`gptkernels kernels`: what every kernel for GPUs uses on each architecture, found here without a GPU.

Three tables: Triton's kernels and the CUDA kernels, each as its compiler leaves them, and what csrc/simt counts as it runs
the CUDA kernels on small tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

from gptkernels.static_native import CUDA, SIMT, cuda_text, line, simt_text

PARTS = ("triton", "cuda", "simt")
OPS = ("attention", "layer_norm", "mlp", "cross_entropy", "linear")
LIGER = ("liger layer_norm", "liger cross_entropy")
# Those that are called by another name than their folder's.
CALLED = {"causal_attention": "attention", "causal_attention_packed": "attention"}
CALLED |= {"gelu_mlp": "mlp", "linear_cross_entropy": "cross_entropy"}
KNOWN_ARCHES = (80, 86, 89, 90, 100, 120)
OVERVIEW = """\
columns:
  regs, spill      registers of a thread; bytes of them that do not fit and live in memory
  shared           KB of a block, and what the architecture allows
  occ              warps that fit on a multiprocessor at once, of those that it can hold
  tensor cores     instructions in the code: mma (sm_80 to sm_89, sm_120), wgmma (sm_90), tcgen05 (sm_100)
  async            how matrices reach shared memory: cp.async or TMA
  ld, st           bytes of a thread's widest load and store in global memory (a TMA load is none of a thread's)
  instr            instructions in the code
  /elem            instructions that a thread executes for each element; - where the code loops
of the CUDA kernels:
  HMMA, LDGSTS     tensor-core, cp.async and ldmatrix (LDSM) instructions in the code; shared is in bytes, without what
                   a launch adds
  wavefronts       passes through the banks of shared memory; conflicts are those beyond what the bytes need
  sectors          32-byte pieces of global memory that instructions touch, and over what their bytes fill
A kernel that spills, does not fit, or leaves tensor cores, cp.async/TMA or 16-byte loads unused is named at the end.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one case on one architecture."""

    op: str
    size: str
    dtype: str
    arch: int
    kernel: str
    figures: dict[str, Any]
    per_element: float | None
    problems: list[str]


def rows_of(index: int, arch: int, liger: bool) -> list[Row]:
    """Compile the kernels of one case; runs in a process of its own, which finds the case by its index."""
    from gptkernels.static import figures, problems, recorded

    case = all_cases(liger)[index]
    with recorded(arch) as launches:
        case.run(f"cuda:{arch}")
    rows = []
    for launch in {launch.key: launch for launch in reversed(launches)}.values():
        found = figures(launch)
        per_element = None
        if case.elements is not None and found.executed is not None:
            programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
            per_element = found.executed * found.threads * programs / case.elements(launch)
        wrong = problems(found, case.dtype) if not case.op.startswith("liger") else []
        dtype = str(case.dtype).removeprefix("torch.")
        rows.append(Row(case.op, case.size, dtype, arch, launch.name, found.as_dict(), per_element, wrong))
    return rows[::-1]


def all_cases(liger: bool) -> list[Any]:
    from gptkernels.static_cases import cases, liger_cases

    return cases() + (liger_cases() if liger else [])


def table(arches: Sequence[int], everything: bool, op: str, liger: bool, jobs: int) -> Iterator[Row]:
    """The rows, case by case, as they come from `jobs` processes."""
    chosen = [
        (i, arch)
        for i, case in enumerate(all_cases(liger))
        if (everything or case.usual) and op in case.op
        for arch in arches
    ]
    if not chosen:
        raise ValueError(f"no kernels of an operator called {op!r}")
    indices, archs = zip(*chosen, strict=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(rows_of, indices, archs, repeat(liger)):
            yield from rows


# Column and width.
COLUMNS = {"kernel": 28, "case": 27, "dtype": 9, "sm": 4, "regs": 5, "spill": 6, "shared": 11, "warps": 6, "occ": 5}
COLUMNS |= {"tensor cores": 13, "async": 9, "ld": 3, "st": 3, "instr": 6, "/elem": 6}
HEADS = {"triton": COLUMNS, "cuda": CUDA, "simt": SIMT}


def text(row: Row) -> str:
    f = row.figures
    units = ", ".join(f"{count} {kind}" for kind, count in f["tensor_cores"].items()) or "-"
    shared = f"{f['shared'] / 1024:.0f} of {f['shared_limit'] // 1024}"
    per_element = "-" if row.per_element is None else f"{row.per_element:.1f}"
    usage = (
        f["registers"],
        f["spilled"],
        shared,
        f["threads"] // 32,
        f"{f['occupancy']:.0%}",
        units,
        f["asynchronous"],
    )
    counts = (f["widest_load"], f["widest_store"], f["instructions"], per_element)
    return line((row.kernel, f"{row.op} {row.size}", row.dtype, row.arch, *usage, *counts), COLUMNS)


def unavailable(part: str, liger: bool) -> str | None:
    """Why a table cannot be made here, or None."""
    try:
        if part == "triton":
            all_cases(liger)
            return None
        if part == "cuda":
            from gptkernels import static_cuda

            return static_cuda.unavailable()
        from gptkernels import simt

        simt.module()
    except ImportError as error:
        return f"it needs triton, and liger-kernel for --liger: {error}"
    except RuntimeError as error:
        return str(error)
    return None


def lines(part: str, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str, list[str]]]:
    """(figures, a line of text, what is wrong) for each row of a table."""
    if part == "triton":
        for row in table(
            KNOWN_ARCHES if options.all else options.arch, options.all, options.op, options.liger, options.jobs
        ):
            which = f"{row.kernel} ({row.op} {row.size}, {row.dtype}, sm_{row.arch})"
            yield dataclasses.asdict(row), text(row), [f"{which} {problem}" for problem in row.problems]
    elif part == "cuda":
        from gptkernels import static_cuda

        for kernel in static_cuda.table(static_cuda.ARCHES if options.all else options.arch, options.op, options.jobs):
            wrong = [f"{kernel.name} (sm_{kernel.arch}) {problem}" for problem in static_cuda.problems(kernel)]
            yield kernel.as_dict(), cuda_text(kernel), wrong
    else:
        from gptkernels import static_simt

        for counts in static_simt.table(options.op):
            yield counts.as_dict(), simt_text(counts), []


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptkernels kernels",
        description=__doc__,
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--of", nargs="+", choices=PARTS, help="which tables (default: all that can be made here)")
    add(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        metavar="SM",
        help="80 86 89 90 100 120, without Triton's table also 75 (default 80 90 100)",
    )
    add("--all", action="store_true", help="every size and architecture; without a cache most of an hour")
    add("--op", default="", help="only operators with this in their name")
    add(
        "--liger",
        action="store_true",
        help="also Liger-Kernel's LayerNorm and cross-entropy (pip install liger-kernel)",
    )
    add("--json", action="store_true", help="one JSON object a line")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command line; 1 if a kernel is not as it should be, 2 if a table that was asked for cannot be made."""
    parser = arguments()
    options = parser.parse_args(argv)
    known = KNOWN_ARCHES if "triton" in (options.of or PARTS) else (75, *KNOWN_ARCHES)
    if unknown := [arch for arch in options.arch if arch not in known]:
        parser.error(f"--arch must be one of {', '.join(map(str, known))}, got {unknown[0]}")
    options.op = CALLED.get(options.op, options.op)
    if not any(options.op in op for op in OPS):
        names = (*OPS, *LIGER) if options.liger and options.of in (None, ["triton"]) else OPS
        if not any(options.op in op for op in names):
            parser.error(f"--op must be in the name of one of {', '.join(names)}, got {options.op}")
        options.of = ["triton"]  # the one table that has Liger's
    reasons = {part: unavailable(part, options.liger) for part in options.of or PARTS}
    for part, reason in reasons.items():
        if reason:
            print(f"gptkernels kernels: no table of {part}: {reason}", file=sys.stderr)
    if all(reasons.values()) or (options.of and any(reasons.values())):
        return 2
    wrong = []
    for part in [part for part, reason in reasons.items() if reason is None]:
        if not options.json:
            print(line(HEADS[part], HEADS[part]), flush=True)
        for figures, words, found in lines(part, options):
            print(json.dumps({"table": part, **figures}) if options.json else words, flush=True)
            wrong += found
    for message in wrong:
        print(message, file=sys.stderr)
    return 1 if wrong else 0
