"""Results as a long table: one line a number, with everything that it depends on, for any tool that reads CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

# Of the machine and of the case; then of the single number.
MACHINE = ("date", "commit", "gpu", "cpu", "kernels", "threads", "torch", "triton")
CASE = ("what", "work", "shape", "axis", "at", "device", "dtype", "cache")
NUMBER = ("column", "launch", "row", "metric", "value")


def long_rows(result: Mapping) -> Iterator[tuple[object, ...]]:
    """Every number of a result of `bench`, in the order MACHINE, CASE, NUMBER."""
    machine = result["machine"]
    for case in result["cases"]:
        about = {
            "what": result["what"],
            "work": case.get("op") or case.get("size"),
            "shape": " ".join(f"{key}={value}" for key, value in case["shape"].items()),
        }
        known = {**machine, **case, **about}
        head = tuple(known.get(field, "") for field in (*MACHINE, *CASE))
        for column, note in case["columns"].items():
            for numbers in column_numbers(case["rows"], note):
                yield *head, column, *numbers
        for column, of in case.get("breakdown", {}).items():
            for numbers in breakdown_numbers(of):
                yield *head, column, "direct", *numbers


def column_numbers(rows: list[str], note: Mapping) -> Iterator[tuple[str, str, str, float]]:
    """(launch, row, metric, value) of a column."""
    for launch, of in (("direct", note), ("graph", note.get("graph", {}))):
        for row in (*rows, "host"):
            for metric, value in of.get(row, {}).items():
                yield launch, row, metric, value
    for metric, value in note.get("memory", {}).items():
        if metric != "unavailable":
            yield "direct", "memory", metric, value
    if "kept_bytes" in note:
        yield "direct", "memory", "kept_mb", note["kept_bytes"] / 1e6


def breakdown_numbers(of: Mapping) -> Iterator[tuple[str, str, float]]:
    """(row, metric, value) of a column's breakdown."""
    for name, value in of.items():
        if name == "kept_bytes":
            yield from ((f"breakdown {row}", "kept_mb", number / 1e6) for row, number in value.items())
        elif isinstance(value, Mapping):
            yield from ((f"breakdown {name} {row}", "ms", number) for row, number in value.items())
        elif name != "steps":
            yield f"breakdown {name}", "ms", value


def csv_text(result: Mapping) -> str:
    """The long table of a result."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*MACHINE, *CASE, *NUMBER))
    writer.writerows(long_rows(result))
    return text.getvalue()
