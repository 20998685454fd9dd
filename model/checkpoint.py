"""Checkpoints: plain tensors, numbers and words, written so that a crash never leaves half of one.

One file, whether the model is on one device or whole on each of many. Ranks that hold parts of it write these into a
folder, and the file, which comes last, says into which: of two that take turns, so that it never names half of one.
"""

from __future__ import annotations

import dataclasses
import shutil
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
from model.ranks import Ranks
from model.reference import GPT
from model.tokenizer import Tokenizer, restored
from model.weights_file import load_weights

FORMAT = 2
TENSORS = ("model", "optimizer", "average")
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


def save(payload: dict[str, Any], path: Path, ranks: Ranks) -> None:
    """Write what pack has packed; every rank must ask for it, since each may hold a part."""
    if "parts" in payload:
        from model.parts import write_parts  # not at the top: seconds of imports

        folder = path.with_name(ranks.said_by_first(empty_folder(path).name if ranks.first else ""))
        write_parts(folder, payload["parts"], ranks)
        payload = payload | {"parts": folder.name}
    if ranks.first:
        save_atomically(payload, path)
        for folder in folders_of(path):
            if folder.name != payload.get("parts"):
                shutil.rmtree(folder, ignore_errors=True)


def folders_of(path: Path) -> list[Path]:
    """The folders that the parts of a checkpoint may lie in."""
    return [path.with_name(f"{path.stem}.{turn}") for turn in (0, 1)]


def empty_folder(path: Path) -> Path:
    """A folder for the parts of a new checkpoint, not that of the one there is; what a killed run left there goes."""
    used = read_file(path).get("parts") if path.is_file() else None
    folder = next(folder for folder in folders_of(path) if folder.name != used)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise RuntimeError(f"cannot make {folder}: {error.strerror}: make room there or choose another out=") from error
    return folder


def pack(config: Config, dataset: Dataset, learner: Learner, progress: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run needs to go on bit for bit; progress is step, best_step, best_val_loss, windows and spikes.

    The place in the data is the step, of shards the windows that were taken (model/data.py).
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
    except Exception:  # see read_file
        return False  # who reads it says what is wrong with it
    return isinstance(payload, dict) and "format" in payload


def load(run: str | Path, which: str | None = LAST, tensors: Sequence[str] = TENSORS) -> dict[str, Any]:
    """A checkpoint of a run folder (None: the best, or the last of a run that was stopped before it had a best one).

    `run` may be the file itself. It is read with weights_only: it can hold no code. Of a checkpoint in parts, tensors says
    what to put together; with none, payload["parts"] says where they are.
    """
    path = user_path(run)
    if path.is_dir():
        path /= which or (BEST if (path / BEST).is_file() else LAST)
    if not path.is_file():
        raise ValueError(
            f"RUN must be a run folder with a checkpoint, or a checkpoint file, got {run}: look under runs/"
        )
    payload = read_file(path)
    if "parts" in payload:
        payload["parts"] = path.with_name(payload["parts"])
        return put_together(payload, tensors) if tensors else payload
    return payload


def read_file(path: Path) -> dict[str, Any]:
    """What a checkpoint's file holds."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle it raises whatever they come to: KeyError, IndexError
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): name a run's .pt") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found is None:
        raise ValueError(f"{path} must be a checkpoint of a run, got another file: name a run's .pt, or its folder")
    if found != FORMAT:
        raise ValueError(f"{path} must have checkpoint format {FORMAT}, got {found}: train it again")
    check_whole(path)
    return dict(payload)


def check_whole(path: Path) -> None:
    """Raise unless the numbers in a checkpoint's file have their checksums: torch.save writes these, torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged:
        raise ValueError(
            f"{path} is damaged ({damaged} is not as it was written): take the run's other .pt, or a copy of it"
        )


def put_together(payload: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """A checkpoint in parts as one that is whole: Learner.tensors the other way round."""
    from model.parts import read_whole  # not at the top: seconds of imports

    found = read_whole(payload.pop("parts"), kinds)
    model: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    average: dict[int, Tensor] = {}
    for name, x in found.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model[rest] = x
        elif kind == "average":
            average[int(rest)] = x
        else:
            index, _, key = rest.partition(".")
            states.setdefault(int(index), {})[key] = x
    if payload["config"]["model.tie"]:
        model["lm_head.weight"] = model["transformer.wte.weight"]
    return payload | {"model": model, "optimizer": {"state": states}, "average": [average[i] for i in sorted(average)]}


def load_model(run: str | Path, which: str | None = None, *, backend: str = "auto") -> tuple[Model, Tokenizer, Config]:
    """The trained model of a run in eval mode on the CPU, its tokenizer and its configuration; `which` as in load.

    It has the backend given here, not the one that it was trained with, which may need another device. LoRA is merged into
    the weights. hf:FOLDER is a GPT-2 as transformers saves it.
    """
    if str(run).startswith(PREFIX):
        return load_hf(str(run), backend)
    payload = load(run, which, tensors=("model",))
    config = build(payload["config"])
    model = build_model(dataclasses.replace(config, train=dataclasses.replace(config.train, backend=backend)))
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
