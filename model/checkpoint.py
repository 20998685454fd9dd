"""Checkpoints: plain tensors, numbers and words, written so that a crash never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import Config, build, flatten
from model.data import CharTokenizer, Dataset
from model.fast import FastGPT
from model.reference import GPT

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def build_model(config: Config) -> nn.Module:
    """The model that a configuration asks for, with weights from torch's global random state."""
    if config.train.model == "reference":
        return GPT(config.model)
    return FastGPT(config.model, backend=config.train.backend)


def save_atomically(payload: dict[str, Any], path: Path) -> None:
    """torch.save such that `path` is, at every moment and after a power cut, the old file or the new one."""
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}"
    )  # in the same folder: a rename is atomic within a disk only
    try:
        with temporary.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def pack(
    config: Config, dataset: Dataset, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a run needs to go on bit for bit; progress is step, best_step and best_val_loss.

    The place in the data is the step: batches are a function of the seed and the step (model/data.py).
    """
    return {
        "format": FORMAT,
        "config": flatten(config),
        "characters": dataset.tokenizer.characters,
        "data_sha256": dataset.sha256,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random_state": torch.get_rng_state(),
        **progress,
    }


def load(run: str | Path, which: str | None = LAST) -> dict[str, Any]:
    """A checkpoint of a run folder (None: the best, or the last of a run that was stopped before it had a best one).

    `run` may be the file itself. It is read with weights_only: it can hold no code.
    """
    path = Path(run)
    if path.is_dir():
        path /= which or (BEST if (path / BEST).is_file() else LAST)
    if not path.is_file():
        raise ValueError(
            f"RUN must be a run folder with a checkpoint, or a checkpoint file, got {run}: look under runs/"
        )
    payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if payload.get("format") != FORMAT:
        raise ValueError(f"{path} must have checkpoint format {FORMAT}, got {payload.get('format')}: train it again")
    return payload


def load_model(run: str | Path, which: str | None = None) -> tuple[nn.Module, CharTokenizer, Config]:
    """The trained model of a run in eval mode, its tokenizer and its configuration; `which` as in load."""
    payload = load(run, which)
    config = build(payload["config"])
    model = build_model(config)
    model.load_state_dict(payload["model"])
    return model.eval(), CharTokenizer(payload["characters"]), config
