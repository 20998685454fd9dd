"""Columns timed side by side: what a column is, how a round goes, and what its figures are.

A column is one way to do the same work (written-out PyTorch, best eager, torch.compile, ours). Every round times each
column once and rotates the order, so that a disturbance of the machine, the temperature and the cache state that a
neighbour leaves behind fall on all columns alike. The roof is measured in the same rounds, for the same reason.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Sequence
from typing import Protocol

from gptkernels.cost import Cost, fraction_of_roof

Times = dict[str, list[float]]


class Column(Protocol):
    """One way to do the work. `run` does it once and returns the seconds of each row of the table."""

    name: str

    def run(self) -> dict[str, float]: ...


def timed_rounds(columns: Sequence[Column], roofs: Sequence[Column], rounds: int, warmup: int = 2) -> dict[str, Times]:
    """Seconds of every row of every column: one timing each per round, the roofs first, then the columns in turn."""
    for column in (*roofs, *columns) * warmup:
        column.run()
    times: dict[str, Times] = {column.name: {} for column in (*roofs, *columns)}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            for column in (*roofs, *in_turn(columns, r)):
                for row, seconds in column.run().items():
                    times[column.name].setdefault(row, []).append(seconds)
            progress(f"round {r + 1}/{rounds}")
    finally:
        gc.enable()
        progress("")
    return times


def in_turn(columns: Sequence[Column], r: int) -> list[Column]:
    """The order of round r: every other round backwards, since a rotation alone never changes who follows whom."""
    turn = (r // 2) % len(columns)
    order = [*columns[turn:], *columns[:turn]]
    return order[::-1] if r % 2 else order


def progress(text: str) -> None:
    """One line on stderr that overwrites itself, only where somebody is looking."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated between the two nearest values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def time_figures(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, in milliseconds."""
    return {
        "ms": 1e3 * statistics.median(seconds),
        "ms_p20": 1e3 * quantile(seconds, 0.2),
        "ms_p80": 1e3 * quantile(seconds, 0.8),
    }


def figures(seconds: Sequence[float], cost: Cost | None, roof: dict[str, float]) -> dict[str, float]:
    """Times and, where the work has a cost, the throughput and the percent of the measured roof."""
    result = time_figures(seconds)
    if cost is not None:
        median = result["ms"] / 1e3
        flops, bandwidth = roof["matmul_gflops"] * 1e9, roof["copy_gbps"] * 1e9
        result["gflops"] = cost.flops / median / 1e9
        result["gbps"] = cost.bytes / median / 1e9
        result["roof_percent"] = 100 * fraction_of_roof(cost, median, flops, bandwidth)
        result["matmul_roof_percent"] = 100 * result["gflops"] * 1e9 / flops
    return result


def speedups(columns: dict[str, dict], rows: Sequence[str], ours: str = "ours") -> dict[str, dict[str, float]]:
    """How many times faster our column is than each other one, row by row, by medians."""
    return {
        name: {row: figures_[row]["ms"] / columns[ours][row]["ms"] for row in rows if row in figures_}
        for name, figures_ in columns.items()
        if name != ours and any(row in figures_ for row in rows)
    }
