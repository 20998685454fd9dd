"""The files of a run folder that are read by others: metrics.csv, its picture, and JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from model.files import write_text
from model.loss_svg import Point, loss_svg

CSV, JSON_LINES = "metrics.csv", "metrics.jsonl"
COLUMNS = ("step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "val_loss", "val_loss_random")


class Metrics:
    """metrics.csv and metrics.jsonl of a run, flushed at each row: a run that dies leaves its curve."""

    def __init__(self, folder: Path | None, last_step: int = 0, tensorboard: bool = False) -> None:
        """Open the files; a resumed run keeps the rows up to its checkpoint's step and writes the later ones anew.

        None writes nothing: one rank of many keeps the metrics of all. tensorboard adds its event file.
        """
        self.files: list[IO[str]] = []
        self.board: Any = None
        if folder is None:
            return
        if tensorboard:
            self.board = summary_writer()(str(folder), purge_step=last_step + 1)
        kept = [row for row in read_metrics(folder / CSV) if int(row["step"]) <= last_step]
        write_text(folder / CSV, as_csv([dict(zip(COLUMNS, COLUMNS, strict=True)), *kept]))
        lines = [row for row in read_json_lines(folder / JSON_LINES) if row["step"] <= last_step]
        write_text(folder / JSON_LINES, "".join(map(as_json_line, lines)))
        self.files = [(folder / name).open("a", newline="", encoding="utf-8") for name in (CSV, JSON_LINES)]

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty. metrics.csv takes its columns, metrics.jsonl everything."""
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS}
        for file, text in zip(self.files, (as_csv([short]), as_json_line(row)), strict=False):
            append(file, text)
        if self.board is not None:
            for name, value in scalars(row):
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            with contextlib.suppress(OSError):  # of a full disk, of which write has told
                file.close()
        if self.board is not None:
            self.board.close()


def append(file: IO[str], text: str) -> None:
    """Bring more text to a file that is open; RuntimeError where the disk does not take it."""
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        raise RuntimeError(f"cannot write {file.name}: {error.strerror}: make room there") from error


def summary_writer() -> Any:
    """TensorBoard's class of writers; RuntimeError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "tensorboard=on needs its package: run `pip install tensorboard`, or leave it off"
        ) from error
    return SummaryWriter


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row by names, those within a part as part/name."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", x) for inner, x in scalars(value))
        elif value is not None and name != "step":
            yield name, value


def as_json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, where a number that is not finite is null."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value of a row, None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none when there is no file; a torn last line is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} of {path} must be JSON, but it is not: take it out") from error
    return rows


def write_sample(path: Path, step: int, loss: float, sample: str) -> None:
    """Append what a run writes after a step."""
    file = path.open("a", encoding="utf-8")
    try:
        append(file, f"--- step {step}, validation loss {loss:.4f}\n{sample}\n\n")
    finally:
        with contextlib.suppress(OSError):
            file.close()


def trim_samples(path: Path, last_step: int) -> None:
    """Leave out the samples of a run after its checkpoint's step: it will write them again."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for mark in re.finditer(r"^--- step (\d+), validation loss \S+$", text, re.MULTILINE):
        if int(mark[1]) > last_step:
            write_text(path, text[: mark.start()])
            return


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


def points(rows: Iterable[Mapping[str, Any]], column: str) -> list[Point]:
    """(step, value) of the rows that have one."""
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def write_loss_svg(folder: Path) -> None:
    """Draw a run's losses as loss.svg."""
    rows = read_json_lines(folder / JSON_LINES)
    write_text(folder / "loss.svg", loss_svg(folder.name, points(rows, "loss"), points(rows, "val_loss")))
