"""What `gptkernels check` prints: a table, a closing sentence, and one line of JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

import torch

from model.equivalence_rule import LEVELS, Row

# Rows of a level that are shown when all is well: a large model has hundreds of gradients and operator calls.
SHOWN = 5
HEADER = ("level", "quantity", "max error", "PyTorch's", "ratio", "rms ratio", "ulp", "repeats", "allowed", "used", "")


def table(rows: Sequence[Row], show_all: bool = False) -> str:
    """Errors against float64 by level: every row that has failed, and of the others the nearest to their limits."""
    lines: list[tuple[str, ...]] = [HEADER]
    for level in LEVELS:
        of_level = [row for row in rows if row.level == level]
        shown = of_level if show_all else nearest(of_level)
        lines += [cells(row, level if i == 0 else "") for i, row in enumerate(shown)]
        if left := len(of_level) - len(shown):
            lines.append(("", f"and {left} more, farther from their limits", *[""] * (len(HEADER) - 2)))
    return aligned(lines, words=2)


def nearest(rows: Sequence[Row]) -> list[Row]:
    """The rows that have failed, then the nearest to their limits."""
    failed = [row for row in rows if not row.passed]
    return failed + sorted((row for row in rows if row.passed), key=lambda row: row.share, reverse=True)[:SHOWN]


def aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """Columns of equal width: so many of words, to the left, then figures, to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def cells(row: Row, level: str) -> tuple[str, ...]:
    """The row as words."""
    repeats = {None: "-", True: "yes", False: "NO"}[row.repeats]
    return (
        level,
        row.quantity,
        f"{row.error:.1e}",
        f"{row.reference_error:.1e}",
        quotient(row.error, row.reference_error),
        quotient(row.rms, row.reference_rms),
        f"{row.ulp:.1f}",
        repeats,
        f"{row.allowed:.1e}",
        used(row),
        "ok" if row.passed else "FAILED",
    )


def used(row: Row) -> str:
    """How much of what is allowed the error takes, in percent; many times as much as a factor."""
    return f"{100 * row.share:.0f} %" if row.share < 10 else f"{row.share:.2g} x"


def quotient(ours: float, plain: float) -> str:
    """A ratio, or a dash where there is nothing to divide by."""
    return f"{ours / plain:.{2 if ours < 100 * plain else 0}f}" if plain else "-"


def median_ratio(rows: Sequence[Row]) -> float | None:
    """The median of our errors over plain PyTorch's."""
    ratios = [row.ratio for row in rows if math.isfinite(row.ratio) and row.reference_error]
    return statistics.median(ratios) if ratios else None


def sentence(rows: Sequence[Row]) -> str:
    """The result in plain words."""
    failed = [row for row in rows if not row.passed]
    if failed:
        names = ", ".join(row.quantity for row in failed[:3]) + (" and others" if len(failed) > 3 else "")
        return (
            f"FAILED: the fast model is not the reference's function: {len(failed)} of {len(rows)} quantities err more "
            f"than rounding explains, or differ from run to run ({names})."
        )
    # The step's limit is a bound on where its weights can land, and is often touched: it says nothing of a ratio.
    worst, ratio = max((row for row in rows if row.level != "step"), key=lambda row: row.share), median_ratio(rows)
    typical = f" (median {ratio:.2f} times its error)" if ratio is not None else ""
    return (
        f"The fast model computes the reference's function: all {len(rows)} quantities are as close to float64 as plain "
        f"PyTorch's are{typical}, with the same bits in every run; the nearest to its limit is {worst.quantity}, at "
        f"{100 * worst.share:.0f} % of it."
    )


def json_line(rows: Sequence[Row], settings: dict[str, object]) -> str:
    """Every figure on one line."""
    result = {
        "command": "check",
        **settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [row.figures() for row in rows],
        "passed": all(row.passed for row in rows),
    }
    return json.dumps(result, allow_nan=False)
