"""What a user sees of a run: start card, progress, end card, and the files of the run folder."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from gptkernels.cost import training_step
from model.config import Config
from model.data import Dataset
from model.loss_svg import loss_svg

COLUMNS = ("step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "val_loss", "val_loss_random")


class Progress:
    """Lines of a run: in place on a terminal, every so often elsewhere, none when quiet."""

    def __init__(self, quiet: bool = False, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.in_place = self.stream.isatty()

    def update(self, line: str, keep: bool) -> None:
        """Show the state of the run; keep is whether the line is worth staying where lines cannot be overwritten."""
        if self.quiet or not (self.in_place or keep):
            return
        self.stream.write(f"\r\x1b[K{line}" if self.in_place else f"{line}\n")
        self.stream.flush()

    def note(self, text: str) -> None:
        """Show text that stays."""
        if not self.quiet:
            self.stream.write(f"\r\x1b[K{text}\n" if self.in_place else f"{text}\n")
            self.stream.flush()


class Metrics:
    """metrics.csv of a run, flushed at each row: a run that dies leaves its curve."""

    def __init__(self, path: Path, last_step: int = 0) -> None:
        """Open the file; a resumed run keeps the rows up to its checkpoint's step and writes the later ones anew."""
        kept = [row for row in read_metrics(path) if int(row["step"]) <= last_step]
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.file.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv, none when there is no file: a killed run can leave a torn last line."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]


def write_loss_svg(folder: Path) -> None:
    """Draw metrics.csv as loss.svg."""
    rows = read_metrics(folder / "metrics.csv")

    def points(column: str) -> list[tuple[float, float]]:
        return [(float(row["step"]), float(row[column])) for row in rows if row[column]]

    (folder / "loss.svg").write_text(loss_svg(folder.name, points("loss"), points("val_loss")), encoding="utf-8")


def environment(config: Config, dataset: Dataset, parameters: int) -> dict[str, Any]:
    """What a figure of this run depends on beside its configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "data": dataset.source,
        "data_sha256": dataset.sha256,
        "command": sys.argv,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A readable JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def processor_name() -> str:
    """The CPU's name as Linux tells it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def count_parameters(model: nn.Module) -> int:
    """Numbers to train; a tied tensor counts once."""
    return sum(p.numel() for p in model.parameters())


def flops_a_token(config: Config) -> int:
    """Matrix products and norms of a token's forward and backward, by the library's convention (gptkernels/cost.py)."""
    m, B = config.model, config.train.batch
    step = training_step(m.n_layer, m.n_head, m.n_embd, m.vocab_size, B, m.context, dtype_bytes=4).both
    return step.flops // (B * m.context)


def number(value: float | None) -> str:
    """Four digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """9.5s, 3m01s, 2h05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds) // 60
    return f"{minutes}m{int(seconds) % 60:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def count(value: float) -> str:
    """431, 431k, 43.1M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def start_card(config: Config, dataset: Dataset, model: nn.Module, device: torch.device, folder: Path) -> str:
    """What is about to be trained, on what and with what."""
    m, t = config.model, config.train
    parameters = count_parameters(model)
    tokens = t.batch * m.context
    # Parameter, gradient and AdamW's two moments.
    state = parameters * 16 / 2**20
    parts = "plain PyTorch" if t.model == "reference" else f"gptkernels, backend {t.backend}"
    rows = [
        ("model", f"{t.model} ({parts}), {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, context {m.context}"),
        ("parameters", f"{parameters:,} (with gradients and optimizer {state:.1f} MiB)"),
        ("step", f"{t.batch} x {m.context} = {tokens:,} tokens, {count(flops_a_token(config))}FLOP a token, {t.dtype}"),
        ("device", f"{device}, {torch.get_num_threads()} threads, {processor_name()}"),
        ("data", f"{dataset.source}, {len(dataset.tokenizer)} characters, sha256 {dataset.sha256[:12]}"),
        ("split", f"{len(dataset.train):,} tokens to train on, {len(dataset.val):,} to validate"),
        ("seed", str(t.seed)),
        ("run folder", str(folder)),
    ]
    return "\n".join(f"{name:>12}  {text}" for name, text in rows)


def step_line(step: int, steps: int, loss: float, lr: float, grad_norm: float, ms: float, tokens: int) -> str:
    """The state after a step; ms is the recent time a step, blank until there is one."""
    parts = [
        f"step {step}/{steps} {100 * step // steps}%",
        f"loss {loss:.4f}",
        f"lr {lr:.1e}",
        f"gnorm {grad_norm:.2f}",
    ]
    if math.isfinite(ms):
        eta = duration((steps - step) * ms / 1e3)
        parts += [f"{ms:.1f} ms", f"{count(tokens / ms * 1e3)} tok/s", f"eta {eta}"]
    return " | ".join(parts)


def end_card(result: Mapping[str, Any], sample: str, next_commands: Sequence[str]) -> str:
    """What came out, and what to do with it."""
    rows = [
        (
            "validation",
            f"final {result['val_loss']:.4f}, best {result['best_val_loss']:.4f} at step {result['best_step']}; "
            f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits a byte (whole validation part)",
        ),
        ("nanoGPT's way", f"{number(result['val_loss_random'])} (random windows)"),
        ("time", f"{duration(result['seconds'])}, of it training {duration(result['train_seconds'])}"),
        ("speed", f"{result['ms']:.2f} ms a step (median), {count(result['tokens_per_s'])} tokens/s"),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
        ("run folder", f"{result['run']} ({', '.join(sorted(os.listdir(result['run'])))})"),
    ]
    card = "\n".join(f"{name:>14}  {text}" for name, text in rows)
    if sample:
        card += "\n\n" + sample
    return card + "\n\nnext:\n" + "\n".join(f"  {command}" for command in next_commands)
