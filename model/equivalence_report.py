"""What `gptkernels check` prints: a table, a closing sentence, and one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

from model.equivalence_rule import Row

# Gradients that are shown when all is well; a large model has hundreds.
SHOWN_GRADIENTS = 8
HEADER = ("quantity", "largest value", "error of ours", "of PyTorch", "ratio", "allowed", "")


def table(rows: Sequence[Row], show_all: bool = False) -> str:
    """Errors against float64: every row that is no gradient or has failed, and of the gradients the worst."""
    shown = list(rows) if show_all else [row for row in rows if row.passed is False or not is_gradient(row)]
    if not show_all:
        gradients = sorted((row for row in rows if is_gradient(row) and row.passed), key=share, reverse=True)
        shown += gradients[:SHOWN_GRADIENTS]
    lines = [HEADER, *(cells(row) for row in shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if left := len(rows) - len(shown):
        text.append(f"and {left} more gradients, all within the rule and with smaller errors (--all shows them)")
    return "\n".join(line.rstrip() for line in text)


def is_gradient(row: Row) -> bool:
    """Whether the row is a parameter's gradient."""
    return row.quantity.startswith("grad ")


def share(row: Row) -> float:
    """How much of what is allowed the error takes."""
    return row.error / row.allowed if row.allowed else 0.0


def cells(row: Row) -> tuple[str, ...]:
    """The row as words."""
    ratio = "-" if row.reference_error == 0 else f"{row.ratio:.2f}"
    numbers = (f"{row.magnitude:.3g}", f"{row.error:.2e}", f"{row.reference_error:.2e}", ratio, f"{row.allowed:.2e}")
    return (row.quantity, *numbers, "ok" if row.passed else "FAILED")


def sentence(rows: Sequence[Row]) -> str:
    """The result in plain words."""
    failed = [row for row in rows if not row.passed]
    if failed:
        names = ", ".join(row.quantity for row in failed[:3]) + (" and others" if len(failed) > 3 else "")
        return (
            f"FAILED: the fast model is not the reference's function: {len(failed)} of {len(rows)} quantities err more "
            f"than rounding explains ({names})."
        )
    worst = max(rows, key=share)
    ratios = [row.ratio for row in rows if math.isfinite(row.ratio) and row.reference_error]
    typical = f" (median {sorted(ratios)[len(ratios) // 2]:.2f} times its error)" if ratios else ""
    return (
        f"The fast model computes the reference's function: all {len(rows)} quantities are as close to float64 as plain "
        f"PyTorch's are{typical}; the nearest to its limit is {worst.quantity}, at {100 * share(worst):.0f} % of it."
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
