"""Training: one loop for the fast model and the reference, exactly resumable, interruptible, and honest about its times."""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model import report
from model.checkpoint import BEST, LAST, build_model, holds_run, load, pack, save_atomically
from model.config import Config, build, flatten, parse_override, to_toml
from model.data import CharTokenizer, Dataset, load_dataset, random_batch
from model.evaluate import evaluate, sample_text
from model.fast import FastGPT, Model
from model.files import write_text
from model.interrupt import interruptible
from model.optimize import make_optimizer, train_step
from model.progress import Progress
from model.run_files import Metrics, write_json, write_loss_svg

WARM_STEPS = 10  # left out of the times: caches, lazy initialisation, the allocator's first pages
RECENT_STEPS = 50
LINES = 20  # step lines of a run where a line cannot be overwritten
# Another model, split or place would be another run.
FIXED = ("model.", "train.val_fraction", "train.out", "train.name")


@dataclass
class State:
    """What a run carries from step to step."""

    config: Config
    dataset: Dataset
    model: Model
    optimizer: torch.optim.Optimizer
    device: torch.device
    folder: Path
    step: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    step_ms: list[float] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sample: str = ""

    @property
    def backends(self) -> dict[str, str]:
        """The backend of every operator, none for the reference model; raises where one cannot run."""
        dtype = torch.bfloat16 if self.config.train.dtype == "bf16" else None
        return self.model.backends(dtype) if isinstance(self.model, FastGPT) else {}


def save(state: State, name: str) -> None:
    """Write a checkpoint of this moment."""
    progress = {"step": state.step, "best_step": state.best_step, "best_val_loss": state.best_val_loss}
    payload = pack(state.config, state.dataset, state.model, state.optimizer, progress)
    save_atomically(payload, state.folder / name)


def timed_step(state: State) -> dict[str, Any]:
    """One step and what metrics.csv says of it; its time is that of the batch, the step and the loss's arrival."""
    t, context = state.config.train, state.config.model.context
    start = time.perf_counter()
    x, y = random_batch(state.dataset.train, t.batch, context, t.seed, state.step)
    x, y = x.to(state.device), y.to(state.device)
    loss, norm, lr = train_step(state.model, state.optimizer, state.config, state.step, x, y)
    seconds = time.perf_counter() - start
    state.step += 1
    state.step_ms.append(seconds * 1e3)
    times = {"ms": seconds * 1e3, "tokens_per_s": t.batch * context / seconds}
    return {"step": state.step, "loss": loss, "lr": lr, "grad_norm": norm, **times}


def run_loop(state: State, progress: Progress) -> None:
    """Train from the state's step to the last one, or to a Ctrl-C."""
    t = state.config.train
    tokens = t.batch * state.config.model.context
    state.model.train()
    with closing(Metrics(state.folder / "metrics.csv", state.step)) as metrics, interruptible() as interrupt:
        while state.step < t.steps and not interrupt.requested:
            row = timed_step(state)
            evaluating = state.step % t.eval_every == 0 or state.step == t.steps
            memory = report.peak_memory_bytes(state.device)
            figures = report.step_figures(row, t.steps, recent_ms(state.step_ms), tokens, memory)
            progress.update(figures, state.step / t.steps, evaluating or state.step % max(t.steps // LINES, 1) == 0)
            if evaluating:
                state.evaluation = evaluate(state.model, state.dataset, state.config, state.step)
                row |= {k: state.evaluation[k] for k in ("val_loss", "val_loss_random")}
            if evaluating or state.step % t.log_every == 0:
                # Before the checkpoint: a resumed run drops later rows, but could not bring back a missing one.
                metrics.write(row)
            if evaluating:
                keep_evaluation(state, progress)
        if state.step < t.steps:
            save(state, LAST)
            write_loss_svg(state.folder)


def keep_evaluation(state: State, progress: Progress) -> None:
    """Write checkpoints, picture and a sample of a state that has just been evaluated."""
    loss, random = state.evaluation["val_loss"], state.evaluation["val_loss_random"]
    improved = loss < state.best_val_loss
    if improved:
        state.best_step, state.best_val_loss = state.step, loss
        save(state, BEST)
    save(state, LAST)
    write_loss_svg(state.folder)
    if state.config.train.sample_tokens:
        state.sample = sample_text(state.model, state.dataset, state.config)
        with (state.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {state.step}, validation loss {loss:.4f}\n{state.sample}\n\n")
    mark = " (best)" if improved else ""
    windows = "" if random is None else f", {random:.4f} on random windows"
    progress.note(f"step {state.step}: validation loss {loss:.4f}{mark}{windows}")


def recent_ms(step_ms: Sequence[float]) -> float | None:
    """Median time of the last steps without the first ones of the process; None while there is none."""
    recent = step_ms[WARM_STEPS:][-RECENT_STEPS:]
    return statistics.median(recent) if recent else None


def result_of(state: State, seconds: float) -> dict[str, Any]:
    """Every figure of a run; ms is the median step without the first ones of the process. None: not measured."""
    t = state.config.train
    steps = state.step_ms[WARM_STEPS:] or state.step_ms
    ms = statistics.median(steps) if steps else None
    return {
        "run": str(state.folder),
        "step": state.step,
        "interrupted": state.step < t.steps,
        **{k: state.evaluation.get(k) for k in ("val_loss", "val_loss_random", "perplexity", "bits_per_byte")},
        "best_val_loss": state.best_val_loss if state.best_step else None,
        "best_step": state.best_step,
        "seconds": seconds,
        "train_seconds": sum(state.step_ms) / 1e3,
        "ms": ms,
        "tokens_per_s": t.batch * state.config.model.context / ms * 1e3 if ms else None,
        "parameters": report.count_parameters(state.model),
        "peak_memory_bytes": report.peak_memory_bytes(state.device),
        "backends": state.backends,
        "data": state.dataset.source,
        "data_sha256": state.dataset.sha256,
        "sample": state.sample,
    }


def choose_device(name: str) -> torch.device:
    """The device that a setting means; raises where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"device={name} needs a GPU, but torch {torch.__version__} finds none here: use device=cpu")
    return torch.device(name)


def prepare(config: Config, folder: Path, earlier: dict[str, Any] | None = None) -> State:
    """Data, model and optimizer of a configuration, before the first step; earlier is a checkpoint to go on from."""
    t = config.train
    if t.threads:
        torch.set_num_threads(t.threads)
    device = choose_device(t.device)
    tokenizer, expected = (CharTokenizer(earlier["characters"]), earlier["data_sha256"]) if earlier else (None, None)
    dataset = load_dataset(t.data, t.val_fraction, config.model.context, tokenizer, expected)
    wanted, needed = config.model.vocab_size, len(dataset.tokenizer)
    if wanted and wanted < needed:
        raise ValueError(f"vocab_size must be at least the data's {needed} characters, got {wanted}: leave it 0")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or needed))
    torch.manual_seed(t.seed)
    model = build_model(config).to(device)
    state = State(config, dataset, model, make_optimizer(model, config), device, folder)
    _ = state.backends  # a backend that cannot run here raises now, not in the first step
    if earlier:
        model.load_state_dict(earlier["model"])
        state.optimizer.load_state_dict(earlier["optimizer"])
        torch.set_rng_state(earlier["random_state"])
        state.step, state.best_step, state.best_val_loss = (earlier[k] for k in ("step", "best_step", "best_val_loss"))
    return state


def run_folder(config: Config, label: str) -> Path:
    """A new folder for a run: out/name, or out/label-time; raises when a named one holds a run, or none can be made."""
    t = config.train
    stem, attempt = t.name or f"{label or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    folder = Path(t.out) / stem
    if t.name and holds_run(folder):
        raise ValueError(f"{folder} holds a run: resume it with `train --resume {folder}`, or choose another name=")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=bool(t.name))
            return folder
        except FileExistsError as error:
            if t.name:
                raise RuntimeError(f"{folder} must be a folder, but a file is there: choose another name=") from error
            attempt += 1
            folder = Path(t.out) / f"{stem}-{attempt}"
        except OSError as error:
            raise RuntimeError(f"cannot make the run folder {folder}: {error.strerror}: choose another out=") from error


def train(config: Config, *, label: str = "", quiet: bool = False) -> dict[str, Any]:
    """Train a new run and return its figures (see result_of): run, val_loss, best_val_loss, ms, sample, ...

    label begins the run folder's name when the configuration has none. Ctrl-C saves and returns with interrupted=True.
    """
    state = prepare(config, Path(config.train.out))  # before a folder exists: a wrong setting leaves none behind
    state.folder = run_folder(config, label)
    return run(state, quiet)


def resume(folder: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, bit for bit as if it had not stopped; overrides may change [train]."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"RUN must be a run folder to go on with, got the file {folder}: give {folder.parent}")
    payload = load(folder, LAST)
    settings = payload["config"]
    for name, value in map(parse_override, overrides):
        if name.startswith(FIXED) and value != settings[name]:
            raise ValueError(f"{name} must stay {settings[name]!r} in a resumed run, got {value!r}: train a new one")
        settings[name] = value
    config = build(settings)
    if payload["step"] >= config.train.steps:
        raise ValueError(f"{folder} has done its {payload['step']} steps: give steps= a larger number to go on")
    return run(prepare(config, folder, payload), quiet)


def run(state: State, quiet: bool) -> dict[str, Any]:
    """Write down what the run is, train, and show its cards."""
    config, folder, began = state.config, state.folder, time.perf_counter()
    progress = Progress(quiet)
    write_text(folder / "config.toml", to_toml(config))
    write_json(folder / "env.json", report.environment(state.model, state.dataset, state.device, state.backends))
    progress.note(report.start_card(config, state.dataset, state.model, state.device, state.backends, folder))
    command = f"gptkernels train --resume {shlex.quote(str(folder))}"
    if state.step:
        progress.note(f"going on after step {state.step}")
    try:
        run_loop(state, progress)
    except (KeyboardInterrupt, RuntimeError):
        saved = (folder / LAST).is_file()
        progress.note(f"stopped; go on from the last checkpoint with  {command}" if saved else "stopped, nothing saved")
        raise
    result = result_of(state, time.perf_counter() - began)
    write_json(folder / "result.json", result | {"config": flatten(config)})
    if result["interrupted"]:
        progress.note(f"stopped after step {state.step}, saved: go on with  {command}")
    else:
        progress.note(report.end_card(result, report.next_commands(folder, state.dataset, config)))
    return result
