"""What a run carries from step to step, and how it begins: device, data, model, and a folder of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model import report
from model.checkpoint import LAST, build_model
from model.config import Config
from model.data import Dataset, load_dataset, with_vocabulary
from model.fast import FastGPT, Model
from model.fetch import sha256
from model.files import user_path
from model.guard import Spikes
from model.initial import initial
from model.memory import WEIGHT_BYTES, activation_bytes, host_room, largest_micro, state_bytes
from model.optimize import Learner, Outcome
from model.precision import DTYPES, choose_dtype
from model.ranks import Ranks, join, local_rank, local_share
from model.run_files import summary_writer
from model.tokenizer import restored


@dataclass
class State:
    """What a run carries from step to step."""

    config: Config
    dataset: Dataset
    learner: Learner
    device: torch.device
    folder: Path
    step: int = 0
    offset: int = 0  # windows of shards that earlier steps of another batch took more than as many of this one
    best_step: int = 0
    best_val_loss: float = math.inf
    step_ms: list[float] = field(default_factory=list)
    spikes: Spikes = field(default_factory=Spikes)
    unread: list[Outcome] = field(default_factory=list)
    unread_since: float = 0.0
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds of training, loss
    sample: str = ""

    @property
    def model(self) -> Model:
        """The model in training."""
        return self.learner.model

    @property
    def logging(self) -> bool:
        """Whether the step just made is one to write down."""
        return self.step % self.config.train.log_every == 0 or self.evaluating

    @property
    def ranks(self) -> Ranks:
        """Which of how many processes this is."""
        return self.learner.ranks

    @property
    def backends(self) -> dict[str, str]:
        """The backend of every operator, none for the reference model; raises where one cannot run."""
        return backends_of(self.model, self.config)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.sequences * self.config.model.context

    @property
    def evaluating(self) -> bool:
        """Whether the step just made is one to evaluate after."""
        t = self.config.train
        return self.step % t.eval_every == 0 or self.step == t.steps


def choose_device(name: str) -> torch.device:
    """The device that a setting means; raises where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name.partition(":")[0] != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"device={name} needs a GPU, but torch {torch.__version__} finds none here: use device=cpu")
    return torch.device(name, local_rank()) if name == "cuda" else torch.device(name)


def prepare(config: Config, folder: Path, earlier: dict[str, Any] | None = None) -> State:
    """Data, model and optimizer of a configuration, before the first step; earlier is a checkpoint to go on from."""
    t = config.train
    if t.threads:
        torch.set_num_threads(t.threads)
    device = choose_device(t.device)
    ranks = join(device)
    check_shares(config, ranks)
    tokenizer, expected = (restored(earlier["tokenizer"]), earlier["data_sha256"]) if earlier else (None, None)
    dataset = load_dataset(t.data, t.val_fraction, config.model.context, tokenizer, expected, local_share())
    check_same(dataset, ranks)
    begins = t.init and not earlier
    shape, weights = initial(config, dataset.tokenizer) if begins else (config.model, None)
    # Resolved once: a run that goes on elsewhere computes as it began.
    resolved = dataclasses.replace(t, dtype=choose_dtype(t.dtype, device))
    config = dataclasses.replace(config, model=with_vocabulary(shape, dataset.tokenizer), train=resolved)
    torch.backends.cuda.matmul.allow_tf32 = t.tf32
    torch.manual_seed(t.seed)
    model = build_model(config, weights).to(device)
    backends = backends_of(model, config)  # one that cannot run here raises now, not in the first step
    if t.tensorboard:
        summary_writer()  # raises without its package, on every rank and before there is a folder
    learner = Learner(config, model, first_micro(config, ranks, model, device, backends), ranks)
    state = State(config, dataset, learner, device, folder)
    if earlier:
        state.learner.restore(earlier)
        torch.set_rng_state(earlier["random_state"])
        state.step, state.best_step, state.best_val_loss = (earlier[k] for k in ("step", "best_step", "best_val_loss"))
        # Of a checkpoint from before these were kept: what they were then.
        state.offset = earlier.get("windows", state.step * config.sequences) - state.step * config.sequences
        state.spikes.restore(earlier.get("spikes", state.spikes.pack()))
    return state


def check_same(dataset: Dataset, ranks: Ranks) -> None:
    """Raise, on every rank, unless all of them have the data of the first: each has read its own."""
    own = sha256(f"{dataset.sha256} {dataset.tokenizer.state}".encode())
    other = ranks.said_by_first(own) != own
    if ranks.any(other, torch.device("cpu")):
        found = f"{dataset.source} on rank {ranks.rank}" if other else "another text on another rank"
        raise ValueError(
            f"every rank must have the data of rank 0, got {found}: name one that all see by its whole path"
        )


def backends_of(model: Model, config: Config) -> dict[str, str]:
    """The backend of every operator of a model; raises where one cannot run."""
    return model.backends(DTYPES[config.train.dtype]) if isinstance(model, FastGPT) else {}


def check_shares(config: Config, ranks: Ranks) -> None:
    """Raise unless a step's sequences fall evenly on the ranks, and a rank's on its micro batches; or for offload alone."""
    if config.train.offload and ranks.count == 1:
        raise ValueError(
            "offload=on is FSDP's and must have several ranks, got one: start it by torchrun, or give offload=off "
            "(recompute=full saves memory as well)"
        )
    sequences, micro = config.sequences, config.train.micro_batch
    unit = ranks.count * (1 if micro == "auto" else int(micro))
    if sequences % unit:
        raise ValueError(
            f"a step's sequences must be a multiple of ranks * micro_batch, got {sequences} for {ranks.count} ranks and "
            f"micro_batch={micro}: {max(round(sequences / unit), 1) * unit} is the nearest (batch=, or batch_tokens=)"
        )


def first_micro(config: Config, ranks: Ranks, model: Model, device: torch.device, backends: Mapping[str, str]) -> int:
    """Sequences of a forward: the setting, or as many as should fit."""
    micro = config.train.micro_batch
    if micro != "auto":
        return int(micro)
    parameters, trained = report.count_parameters(model), report.count_trained(model)
    # All weights are there already, also of a model that is about to be spread.
    state, host = state_bytes(config, parameters, trained, ranks, 1)
    state += host if device.type == "cpu" else 0
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_room()
    room = free - state + WEIGHT_BYTES * parameters
    return ranks.least(largest_micro(config, config.sequences // ranks.count, room, backends))


def run_folder(config: Config, label: str) -> Path:
    """A new folder for a run: out/name, or out/label-time; raises when a named one holds a run, or none can be made."""
    t = config.train
    stem, attempt = t.name or f"{label or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    folder = user_path(t.out) / stem
    # A best checkpoint alone is left by a run that was killed within its first evaluation: it can only begin again.
    if t.name and (folder / LAST).is_file():
        raise ValueError(f"{folder} holds a run: resume it with `train --resume {folder}`, or choose another name=")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=bool(t.name))
            return folder
        except FileExistsError as error:
            if t.name:
                raise RuntimeError(f"{folder} must be a folder, but a file is there: choose another name=") from error
            attempt += 1
            folder = user_path(t.out) / f"{stem}-{attempt}"
        except OSError as error:
            raise RuntimeError(f"cannot make the run folder {folder}: {error.strerror}: choose another out=") from error


def estimated_bytes(state: State) -> int:
    """The memory of a step as it was expected."""
    kept = activation_bytes(state.config, state.learner.micro, state.backends)
    parameters, trained = report.count_parameters(state.model), report.count_trained(state.model)
    held, host = state_bytes(state.config, parameters, trained, state.ranks, state.learner.micro)
    return kept + held + (host if state.device.type == "cpu" else 0)
