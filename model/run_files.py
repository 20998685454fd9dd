"""The files of a run folder that are read by others: metrics.csv, its picture, and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from model.files import write_text
from model.loss_svg import loss_svg

COLUMNS = ("step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "val_loss", "val_loss_random")


class Metrics:
    """metrics.csv of a run, flushed at each row: a run that dies leaves its curve."""

    def __init__(self, path: Path | None, last_step: int = 0) -> None:
        """Open the file; a resumed run keeps the rows up to its checkpoint's step and writes the later ones anew.

        None writes nothing: one rank of many keeps the metrics of all.
        """
        self.file: IO[str] | None = None
        if path is None:
            return
        kept = [row for row in read_metrics(path) if int(row["step"]) <= last_step]
        write_text(path, as_csv([dict(zip(COLUMNS, COLUMNS, strict=True)), *kept]))
        self.file = path.open("a", newline="", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        if self.file is None:
            return
        try:
            self.file.write(as_csv([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}]))
            self.file.flush()
        except OSError as error:
            raise RuntimeError(f"cannot write {self.file.name}: {error.strerror}: make room there") from error

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows in the order of the columns, as text."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv, none when there is no file: a killed run can leave a torn last line."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [row for row in csv.DictReader(whole) if None not in row.values() and row["step"].isdigit()]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A readable JSON file."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_loss_svg(folder: Path) -> None:
    """Draw metrics.csv as loss.svg."""
    rows = read_metrics(folder / "metrics.csv")

    def points(column: str) -> list[tuple[float, float]]:
        return [(float(row["step"]), float(row[column])) for row in rows if row[column]]

    write_text(folder / "loss.svg", loss_svg(folder.name, points("loss"), points("val_loss")))
