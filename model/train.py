"""Training: one loop for the fast model and the reference, exactly resumable, interruptible, and honest about its times."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint, report
from model.checkpoint import BEST, LAST, load, load_source, pack
from model.config import Config, build, flatten, override, parse_override, read_preset, to_toml
from model.convert import write_weights
from model.data import random_batch
from model.evaluate import evaluate, sample_text
from model.files import hold, user_path, write_text
from model.guard import check_evaluation, failure, keep_batch
from model.interrupt import interruptible
from model.memory import kept_by_operator
from model.progress import Progress
from model.ranks import begins_first
from model.run_files import Metrics, trim_samples, write_json, write_loss_svg, write_sample
from model.run_page import run_page
from model.state import State, estimated_bytes, prepare, run_folder
from model.throughput import flops_a_token, peak_flops
from model.weights_file import EVERY, WEIGHTS

WARM_STEPS = 10  # left out of the times: caches, lazy initialisation, the allocator's first pages
RECENT_STEPS = 50
LINES = 20  # step lines of a run where a line cannot be overwritten
# Another model, split or place would be another run.
FIXED = ("model.", "lora.", "train.init", "train.val_fraction", "train.out", "train.name")


def save(state: State, name: str) -> None:
    """Write a checkpoint of this moment."""
    progress = {
        "step": state.step,
        "best_step": state.best_step,
        "best_val_loss": state.best_val_loss,
        "windows": state.offset + state.step * state.config.sequences,
        "spikes": state.spikes.pack(),
    }
    payload = pack(state.config, state.dataset, state.learner, progress)
    checkpoint.save(payload, state.folder / name, state.ranks)


def step_batch(state: State, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets that this rank learns from in step number `step`, from 0."""
    config, (rank, count) = state.config, (state.ranks.rank, state.ranks.count)
    seed, context = config.train.seed, config.model.context
    tokens, offset = state.dataset.train, state.offset
    return random_batch(tokens, config.sequences, context, seed, step, rank=rank, ranks=count, offset=offset)


def timed_step(state: State) -> dict[str, Any] | None:
    """One step, and what metrics.csv says of it where it is read: every one on a CPU, on a GPU one in log_every.

    In between the host does not wait for the GPU, it goes on preparing the next steps.
    """
    if not state.unread:
        state.unread_since = time.perf_counter()
    step = state.step
    state.step += 1
    state.unread.append(state.learner.step(step, *step_batch(state, step), detailed=state.logging))
    return read_steps(state) if reads_each_step(state) or state.logging else None


def reads_each_step(state: State) -> bool:
    """Whether a loss costs nothing to look at: a CPU has computed it when the step returns."""
    return state.device.type == "cpu"


def read_steps(state: State) -> dict[str, Any]:
    """Wait for the steps that were not read yet; the figures of the last one, with the mean time of them all.

    RuntimeError, with the weights as they were before it, for a step whose loss or gradient was not finite.
    """
    numbers = torch.stack([torch.stack((one.loss, one.norm)) for one in state.unread]).tolist()
    seconds = (time.perf_counter() - state.unread_since) / len(state.unread)
    unread, state.unread = state.unread, []
    for one, (loss, norm) in zip(unread, numbers, strict=True):
        look_at(state, one.step, loss, norm)
    state.step_ms += [seconds * 1e3] * len(unread)
    times = {"ms": seconds * 1e3, "tokens_per_s": state.tokens / seconds}
    names, norms = list(unread[-1].norms), list(unread[-1].norms.values())
    layers = dict(zip(names, torch.stack(norms).tolist(), strict=True)) if norms else {}
    return {"step": state.step, "loss": loss, "lr": unread[-1].lr, "grad_norm": norm, **times, "grad_norms": layers}


def look_at(state: State, step: int, loss: float, norm: float) -> None:
    """Raise where a step, from 0, was not finite; keep what it learned from there, and where its loss stands out."""

    def keep(why: dict[str, Any]) -> Path:
        rank, tokenizer = state.ranks.rank, state.dataset.tokenizer
        return keep_batch(state.folder, tokenizer, rank, step + 1, *step_batch(state, step), why)

    overflow = math.isfinite(loss) and state.learner.may_overflow
    if not (math.isfinite(loss) and (math.isfinite(norm) or overflow)):
        state.step = step
        error = failure(state.learner, step, *step_batch(state, step), loss, norm)
        keep({"loss": str(loss), "norm": str(norm)})
        raise error
    if (usual := state.spikes.usual(loss)) is not None:
        path = keep({"loss": loss, "usual": usual})
        state.learner.notes.append(
            f"step {step + 1}: loss {loss:.4f} where {usual:.4f} is usual; its text is kept in {path}"
        )


def run_loop(state: State, progress: Progress) -> None:
    """Train from the state's step to the last one, or to a Ctrl-C."""
    t, ranks, stop = state.config.train, state.ranks, False
    state.model.train()
    folder = state.folder if ranks.first else None
    if ranks.first:
        trim_samples(state.folder / "samples.txt", state.step)
    with closing(Metrics(folder, state.step, t.tensorboard)) as metrics, interruptible() as interrupt:
        while state.step < t.steps and not stop:
            row = timed_step(state)
            if row is not None:
                take_note(state, row, progress, metrics)
            # On the host, which waits for no GPU: torchrun gives a process half a minute to end.
            stop = ranks.any(interrupt.requested, torch.device("cpu"))
        if state.unread:
            take_note(state, read_steps(state), progress, metrics)
        if state.step < t.steps:
            save(state, LAST)
            draw(state)


def draw(state: State) -> None:
    """The picture of the losses, and the page of the run so far."""
    if state.ranks.first:
        write_loss_svg(state.folder)
        kept = kept_by_operator(state.config, state.backends)
        write_text(state.folder / "report.html", run_page(state.folder, state.config, kept, state.sample))


def take_note(state: State, row: dict[str, Any], progress: Progress, metrics: Metrics) -> None:
    """Show and write down a step that was read, and evaluate after it where it is due."""
    t, evaluating = state.config.train, state.evaluating
    ms, memory = recent_ms(state.step_ms), report.peak_memory_bytes(state.device)
    figures = report.step_figures(row, t.steps, ms, state.tokens, memory, mfu(state, ms))
    while state.learner.notes:
        progress.note(state.learner.notes.pop(0))
    progress.update(figures, state.step / t.steps, evaluating or state.step % max(t.steps // LINES, 1) == 0)
    if not evaluating:
        if state.logging:
            metrics.write(row)
        return
    with state.learner.averaged():
        state.evaluation = evaluate(state.model, state.dataset, state.config, state.step, state.ranks)
        row |= {k: state.evaluation[k] for k in ("val_loss", "val_loss_random")}
        # Before the checkpoint: a resumed run drops later rows, but could not bring back a missing one.
        metrics.write(row)
        check_evaluation(state.learner, state.step, [row["val_loss"], row["val_loss_random"]])
        keep_evaluation(state, progress)
    save(state, LAST)
    draw(state)


def mfu(state: State, ms: float | None) -> float | None:
    """The share of the device's peak that steps of so many milliseconds use; None where one of them is not known."""
    peak = peak_flops(state.device, state.config.train.dtype, state.config.train.tf32)
    return state.tokens * flops_a_token(state.config) / ms * 1e3 / (peak * state.ranks.count) if ms and peak else None


def keep_evaluation(state: State, progress: Progress) -> None:
    """Write the best checkpoint and a sample of a state that has just been evaluated."""
    loss, random = state.evaluation["val_loss"], state.evaluation["val_loss_random"]
    state.evaluations.append((state.step, train_seconds(state), loss))
    improved = loss < state.best_val_loss
    if improved:
        state.best_step, state.best_val_loss = state.step, loss
        save(state, BEST)
    if state.config.train.sample_tokens:
        state.sample = sample_text(state.model, state.dataset, state.config)
    if state.sample and state.ranks.first:
        write_sample(state.folder / "samples.txt", state.step, loss, state.sample)
    mark = " (best)" if improved else ""
    windows = "" if random is None else f", {random:.4f} on random windows"
    progress.note(f"step {state.step}: validation loss {loss:.4f}{mark}{windows}")


def recent_ms(step_ms: Sequence[float]) -> float | None:
    """Median time of the last steps without the first ones of the process; None while there is none."""
    recent = step_ms[WARM_STEPS:][-RECENT_STEPS:]
    return statistics.median(recent) if recent else None


def train_seconds(state: State) -> float:
    """Seconds of this process in steps of training, without evaluations and what is written."""
    return sum(state.step_ms) / 1e3


def result_of(state: State, seconds: float) -> dict[str, Any]:
    """Every figure of a run; ms is the median step without the first ones of the process. None: not measured.

    evaluations are this process's: step, train_seconds so far and validation loss.
    """
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
        "train_seconds": train_seconds(state),
        "evaluations": state.evaluations,
        "ms": ms,
        "tokens_per_s": state.tokens / ms * 1e3 if ms else None,
        "mfu": mfu(state, ms),
        "parameters": report.count_parameters(state.model),
        "peak_memory_bytes": report.peak_memory_bytes(state.device),
        "estimated_memory_bytes": estimated_bytes(state),
        "backends": state.backends,
        "data": state.dataset.source,
        "data_sha256": state.dataset.sha256,
        "sample": state.sample,
    }


def train(config: Config, *, label: str = "", quiet: bool = False) -> dict[str, Any]:
    """Train a new run and return its figures (see result_of): run, val_loss, best_val_loss, ms, sample, ...

    label begins the run folder's name when the configuration has none. Ctrl-C saves and returns with interrupted=True.
    """
    state = prepare(config, Path(config.train.out))  # before a folder exists: a wrong setting leaves none behind
    state.folder = Path(state.ranks.said_by_first(str(run_folder(config, label)) if state.ranks.first else ""))
    with held(state.folder):
        return run(state, quiet)


def resume(folder: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, bit for bit as if it had not stopped; overrides may change [train]."""
    folder = user_path(folder)
    if not folder.is_dir():
        instead = f"the file {folder}: give {folder.parent}" if folder.is_file() else f"{folder}: look under runs/"
        raise ValueError(f"RUN must be a run folder to go on with, got {instead}")
    with held(folder):
        return resume_held(folder, overrides, quiet)


def held(folder: Path) -> AbstractContextManager[None]:
    """Around all that one of the ranks writes into a run's folder, and reads there to go on from."""
    return hold(folder) if begins_first() else nullcontext()


def resume_held(folder: Path, overrides: Sequence[str], quiet: bool) -> dict[str, Any]:
    """resume, in a folder that no other process writes."""
    payload = load(folder, LAST, tensors=())  # each rank reads its part
    settings = dict(payload["config"])
    notes = check_unedited(folder, settings, overrides)
    for name, value in map(parse_override, overrides):
        if name.startswith(FIXED) and value != settings[name]:
            raise ValueError(f"{name} must stay {settings[name]!r} in a resumed run, got {value!r}: train a new one")
        override(settings, name, value)
    config = build(settings)
    if payload["step"] >= config.train.steps:
        raise ValueError(f"{folder} has done its {payload['step']} steps: give steps= a larger number to go on")
    state = prepare(config, folder, payload)
    state.learner.notes += notes
    if settings != payload["config"]:  # at once: a run that is killed before its next checkpoint has them too
        save(state, LAST)
    return run(state, quiet)


def export_best(state: State, progress: Progress) -> None:
    """The best weights for other programs; where that fails the run is as good without them."""
    try:
        write_weights(state.folder / WEIGHTS, load_source(str(state.folder), (), EVERY)[0])
    except (RuntimeError, MemoryError) as error:
        command = f"gptkernels convert {shlex.quote(str(state.folder))} FILE.safetensors"
        progress.note(f"{WEIGHTS} is missing ({error or 'out of memory'}): write it with  {command}")


def check_unedited(folder: Path, settings: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Raise where config.toml, which is for readers, was made to say another model than the checkpoint's.

    Of what may change, but not there, it returns words for the user.
    """
    path = folder / "config.toml"
    written = read_preset(str(path)) if path.is_file() else {}
    for name, value in written.items():
        if name.startswith(FIXED) and value != settings.get(name, value):
            raise ValueError(
                f"{path} says {name} = {value!r}, but the run was made with {settings[name]!r}: restore it (what may change "
                "is given after --resume RUN), or train a new one"
            )
    given = {parse_override(text)[0] for text in overrides}
    changed = [name for name, value in written.items() if name not in given and value != settings.get(name, value)]
    return [
        f"{path} says {name} = {written[name]!r}, the run has {settings[name]!r} and keeps it: give it after --resume RUN"
        for name in changed
    ]


def run(state: State, quiet: bool) -> dict[str, Any]:
    """Write down what the run is, train, and show its cards."""
    config, folder, began = state.config, state.folder, time.perf_counter()
    progress, first = Progress(quiet or not state.ranks.first), state.ranks.first
    if first:
        write_text(folder / "config.toml", to_toml(config))
        environment = report.environment(state.model, state.dataset, state.device, state.backends)
        write_json(folder / "env.json", environment)
    progress.note(
        report.start_card(
            config, state.dataset, state.model, state.device, state.backends, state.learner.micro, state.ranks, folder
        )
    )
    program = (
        f"torchrun --no-python --nproc-per-node {state.ranks.count} gptkernels"
        if state.ranks.count > 1
        else "gptkernels"
    )
    command = f"{program} train --resume {shlex.quote(str(folder))}"
    if state.step:
        progress.note(f"going on after step {state.step}")
    try:
        run_loop(state, progress)
    except (KeyboardInterrupt, RuntimeError, OSError) as error:
        saved = (folder / LAST).is_file()
        progress.note(f"stopped; go on from the last checkpoint with  {command}" if saved else "stopped, nothing saved")
        if state.ranks.lost(error):
            raise RuntimeError(f"another rank has ended, and so does rank {state.ranks.rank}: {error}") from error
        raise
    result = result_of(state, time.perf_counter() - began)
    if first:
        write_json(folder / "result.json", result | {"config": flatten(config), "machine": environment})
    if result["interrupted"]:
        progress.note(f"stopped after step {state.step}, saved: go on with  {command}")
    if first and state.best_step:  # after a Ctrl-C too: that of an earlier end would be of other weights
        export_best(state, progress)
    if not result["interrupted"]:
        progress.note(report.end_card(result, report.next_commands(folder, state.dataset, config, command)))
    return result
