"""Checkpoints: plain tensors, numbers and words, written so that a crash never leaves half of one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Config, build, flatten
from model.data import Dataset
from model.fast import FastGPT, Model
from model.files import user_path, write_atomically
from model.hf import PREFIX, folder_of, load_hf
from model.lora import add_lora, merge_lora
from model.optimize import Learner
from model.reference import GPT
from model.tokenizer import Tokenizer, restored
from model.weights_file import load_weights

FORMAT = 2
LAST, BEST = "last.pt", "best.pt"


def build_model(config: Config, weights: dict[str, Tensor] | None = None) -> Model:
    """The model that a configuration asks for, with the given weights or new ones from torch's global random state."""
    reference = config.train.model == "reference"
    model = GPT(config.model) if reference else FastGPT(config.model, backend=config.train.backend)
    if weights is not None:
        model.load_state_dict(weights)
    if config.lora.rank:
        add_lora(model, config.lora)
    return model


def save_atomically(payload: dict[str, Any], path: Path) -> None:
    """torch.save such that `path` is, at every moment and after a power cut, the old file or the new one."""
    write_atomically(path, lambda file: torch.save(payload, file))


def pack(config: Config, dataset: Dataset, learner: Learner, progress: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run needs to go on bit for bit; progress is step, best_step and best_val_loss.

    The place in the data is the step: batches are a function of the seed and the step (model/data.py).
    """
    return {
        "format": FORMAT,
        "config": flatten(config),
        "tokenizer": dataset.tokenizer.state,
        "data_sha256": dataset.sha256,
        **learner.pack(),
        "random_state": torch.get_rng_state(),
        **progress,
    }


def holds_run(path: Path) -> bool:
    """Whether a folder has a checkpoint, or a file is one of ours: no tensor of it is read."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return (path / LAST).is_file() or (path / BEST).is_file()
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):
        return False  # who reads it says what is wrong with it
    return isinstance(payload, dict) and "format" in payload


def load(run: str | Path, which: str | None = LAST) -> dict[str, Any]:
    """A checkpoint of a run folder (None: the best, or the last of a run that was stopped before it had a best one).

    `run` may be the file itself. It is read with weights_only: it can hold no code.
    """
    path = user_path(run)
    if path.is_dir():
        path /= which or (BEST if (path / BEST).is_file() else LAST)
    if not path.is_file():
        raise ValueError(
            f"RUN must be a run folder with a checkpoint, or a checkpoint file, got {run}: look under runs/"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): name a run's .pt") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} must have checkpoint format {FORMAT}, got {found}: train it again")
    return dict(payload)


def load_model(run: str | Path, which: str | None = None) -> tuple[Model, Tokenizer, Config]:
    """The trained model of a run in eval mode, its tokenizer and its configuration; `which` as in load.

    LoRA is merged into the weights. hf:FOLDER is a GPT-2 as transformers saves it.
    """
    if str(run).startswith(PREFIX):
        return load_hf(str(run))
    payload = load(run, which)
    config = build(payload["config"])
    model = build_model(config)
    model.load_state_dict(payload["model"])
    merge_lora(model)
    return model.eval(), restored(payload["tokenizer"]), config


def load_source(name: str, overrides: Sequence[str], tokens: int) -> tuple[GPT, Tokenizer | None, Config]:
    """The reference model of a run, a file of weights or hf:FOLDER, and its configuration; a run alone has a tokenizer.

    tokens is the most positions to take of weights that are no run's.
    """
    path = folder_of(name)
    if name.startswith(PREFIX) or not holds_run(path):
        model, config = load_weights(path, overrides, tokens)
        return model, None, config
    if overrides:
        raise ValueError(f"a run has its own settings, got {overrides[0]!r} for {name}: leave it out")
    trained, tokenizer, config = load_model(path)
    return trained.to_reference() if isinstance(trained, FastGPT) else trained, tokenizer, config
