"""Columns timed side by side: what a column is, how a round goes, and what its figures are.

A column is one way to do the same work (written-out PyTorch, best eager, torch.compile, ours). Every round times each
column once and rotates the order, so that a disturbance of the machine, the temperature and the cache state that a
neighbour leaves behind fall on all columns alike. The roof is measured in the same rounds, for the same reason.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from benchmarks.device import Stages
from gptkernels.cost import Cost, fraction_of_roof

Times = dict[str, list[float]]
T = TypeVar("T")


class Timed(Protocol):
    """What is timed in rounds. `run` does it once and returns the seconds of each row of the table."""

    name: str

    def run(self) -> dict[str, float]: ...


class Column(Timed, Protocol):
    """One way to do the work: stages that follow one another, whose time together has the name `total`.

    `results` are what the judge compares and `kept_bytes` what the forward keeps for the backward, None for a bound. A
    CUDA graph of each stage keeps what the stage `holds`, and has the results `gathered` from that.
    """

    total: str

    def stages(self) -> Stages: ...
    def results(self) -> object: ...
    def kept_bytes(self) -> int | None: ...
    def holds(self) -> object: ...
    def gathered(self, held: Sequence[object]) -> object: ...
    def clear(self) -> None: ...


def timed_rounds(
    columns: Sequence[Timed], roofs: Sequence[Timed], rounds: int, share: float, warm: Mapping[str, float]
) -> dict[str, Times]:
    """Seconds of every row of every column: in each round the roofs first, then the columns in turn.

    share is the seconds that one column may take; a slower one is in fewer rounds, evenly spread, and at least in one.
    warm holds the seconds of the runs that columns have made before, which count as their warm-up where they are long.
    """
    columns = list(columns)
    for roof in roofs:
        roof.run()
    planned = {column.name: rounds_within(share, warm_up(column, share, warm), rounds) for column in columns}
    times: dict[str, Times] = {column.name: {} for column in (*roofs, *columns)}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            progress(f"round {r + 1}/{rounds}")
            taking_part = [column for column in in_turn(columns, r) if takes_part(r, planned[column.name], rounds)]
            for column in (*roofs, *taking_part):
                for row, seconds in column.run().items():
                    times[column.name].setdefault(row, []).append(seconds)
    finally:
        gc.enable()
        progress("")
    return times


def warm_up(column: Timed, share: float, warm: Mapping[str, float]) -> float:
    """Run a column once more unless its earlier run was longer than its share; the seconds that a run takes."""
    earlier = warm.get(column.name, 0.0)
    if earlier > share:
        return earlier
    progress(f"warming up {column.name}")
    return max(column.run().values())  # the row that holds all the others is the longest


def rounds_within(share: float, seconds: float, rounds: int) -> int:
    """How many rounds of this length fit into the share."""
    return max(1, min(rounds, int(share / max(seconds, 1e-9))))


def takes_part(r: int, planned: int, rounds: int) -> bool:
    """Whether a column that is planned for some of the rounds is in round r: always in the first, then evenly."""
    return r == 0 or r * planned // rounds > (r - 1) * planned // rounds


def in_turn(columns: Sequence[T], r: int) -> list[T]:
    """The order of round r: every other round backwards, since a rotation alone never changes who follows whom."""
    if not columns:
        return []
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
    """Median and the 20 % and 80 % quantiles, in milliseconds, and of how many runs."""
    return {
        "ms": 1e3 * statistics.median(seconds),
        "ms_p20": 1e3 * quantile(seconds, 0.2),
        "ms_p80": 1e3 * quantile(seconds, 0.8),
        "runs": len(seconds),
    }


def figures(seconds: Sequence[float], cost: Cost, flops_roof: float, bytes_roof: float) -> dict[str, float]:
    """Times, throughput, and the percent of the roofs, which are in flops and bytes a second."""
    result = time_figures(seconds)
    median = result["ms"] / 1e3
    result["gflops"] = cost.flops / median / 1e9
    result["gbps"] = cost.bytes / median / 1e9
    result["matmul_roof_percent"] = 100 * cost.flops / median / flops_roof
    result["roofline_percent"] = 100 * fraction_of_roof(cost, median, flops_roof, bytes_roof)
    return result


def speedups(columns: Mapping[str, dict], rows: Sequence[str], ours: str = "ours") -> dict[str, dict[str, float]]:
    """How many times faster our column is than each other one, row by row, by medians; empty where ours has no time."""
    if rows[0] not in columns.get(ours, {}):
        return {}
    return {
        name: {row: figures_[row]["ms"] / columns[ours][row]["ms"] for row in rows}
        for name, figures_ in columns.items()
        if name != ours and rows[0] in figures_
    }
