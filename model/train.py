"""Training: one loop for the fast model and the reference, exactly resumable, interruptible, and honest about its times."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from model import report
from model.checkpoint import BEST, LAST, build_model, load, pack, save_atomically
from model.config import Config, build, flatten, parse_override, to_toml
from model.data import CharTokenizer, Dataset, all_windows, generator, load_dataset, random_batch
from model.generate import generate

EVAL_TOKENS = (
    4096  # a forward of the full validation pass: large enough to be fast, small enough for a large vocabulary
)
WARM_STEPS = 10  # left out of the times: caches, lazy initialisation, the allocator's first pages
RECENT_STEPS = 50


@dataclass
class State:
    """What a run carries from step to step."""

    config: Config
    dataset: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    folder: Path
    step: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    step_ms: list[float] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Interrupt:
    """Whether the user has asked to stop."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The first Ctrl-C asks for a stop after the step at hand, the second one stops at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # Python lets only the main thread take signals
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def learning_rate(step: int, config: Config) -> float:
    """Linear warmup, then a cosine from lr towards min_lr (nanoGPT's schedule); step counts from 0."""
    t = config.train
    if step < t.warmup:
        return t.lr * (step + 1) / (t.warmup + 1)
    done = min((step - t.warmup) / max(t.steps - t.warmup, 1), 1.0)
    return t.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (t.lr - t.min_lr)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; only tensors of two and more dimensions decay, and a tied tensor is one tensor."""
    t = config.train
    parameters = list(model.parameters())  # each tensor once, however many names it has
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=t.lr, betas=(t.beta1, t.beta2), fused=True)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The arithmetic of the forward: bf16 by autocast, or as the parameters are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.dtype == "bf16")


def train_step(state: State, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """One optimizer step on (x, y): the loss and gradient norm before it, and the learning rate. Raises if not finite."""
    t = state.config.train
    lr = learning_rate(state.step, state.config)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    seed = None
    if state.config.model.dropout:
        seed = generator(t.seed, "dropout", state.step).initial_seed()
    with autocast(state.config, state.device):
        _, loss = state.model(x, y, seed=seed)
    loss.backward()
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    loss_value, norm_value = float(loss.detach()), float(norm)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise RuntimeError(describe_non_finite(state, loss_value, norm_value))
    if t.clip and norm_value > t.clip:
        # Below the limit nothing is multiplied: a pass over every gradient less.
        torch.nn.utils.clip_grads_with_norm_(parameters, t.clip, norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value, lr


def describe_non_finite(state: State, loss: float, norm: float) -> str:
    """Which tensor went wrong first, in the order of the model: a weight, else a gradient."""
    named = list(state.model.named_parameters())
    tensors = [(name, p) for name, p in named] + [(f"the gradient of {name}", p.grad) for name, p in named]
    where = "no weight or gradient, only in the forward"
    for name, tensor in tensors:
        if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
            where = f"{name} ({bad} of {tensor.numel()} values)"
            break
    return (
        f"loss and gradient norm must be finite, got {loss} and {norm} at step {state.step + 1}; not finite first: {where}. "
        f"The checkpoint before it stays in {state.folder}: lower lr, lengthen warmup, or set dtype=fp32"
    )


@torch.no_grad()
def evaluate(state: State) -> dict[str, Any]:
    """Validation loss over the whole validation part, and over random windows as nanoGPT does."""
    config, tokens = state.config, state.dataset.val
    context = config.model.context
    training = state.model.training
    state.model.eval()

    def loss_of(x: Tensor, y: Tensor) -> float:
        with autocast(config, state.device):
            return float(state.model(x.to(state.device), y.to(state.device))[1])

    total = sum(loss_of(x, y) * y.numel() for x, y in all_windows(tokens, max(EVAL_TOKENS // context, 1), context))
    full = total / (len(tokens) - 1)
    t = config.train
    batches = (
        random_batch(tokens, t.batch, context, t.seed, state.step * 100_003 + i, "val") for i in range(t.eval_batches)
    )
    random = [loss_of(x, y) for x, y in batches]
    state.model.train(training)
    size = len(state.dataset.tokenizer.decode(tokens[1:]).encode("utf-8"))
    return {
        "val_loss": full,
        "val_loss_random": statistics.fmean(random) if random else None,
        "perplexity": math.exp(min(full, 700.0)),
        "bits_per_byte": full / math.log(2.0) * (len(tokens) - 1) / size,
    }


def sample_text(state: State) -> str:
    """A sample of the model at this step, from a line break, or from token 0 where the text has none."""
    tokenizer = state.dataset.tokenizer
    start = torch.tensor([tokenizer.ids.get("\n", 0)], device=state.device)
    t = state.config.train
    tokens = generate(state.model, start, t.sample_tokens, temperature=0.8, seed=t.seed, vocabulary=len(tokenizer))
    return tokenizer.decode(torch.tensor(list(tokens), dtype=torch.int64)).strip("\n")


def save(state: State, name: str) -> None:
    """Write a checkpoint of this moment."""
    progress = {"step": state.step, "best_step": state.best_step, "best_val_loss": state.best_val_loss}
    payload = pack(state.config, state.dataset, state.model, state.optimizer, progress)
    save_atomically(payload, state.folder / name)


def evaluate_and_save(state: State, progress: report.Progress) -> str:
    """Evaluate, write both checkpoints and a sample; returns the sample."""
    state.evaluation = evaluate(state)
    loss = state.evaluation["val_loss"]
    improved = loss < state.best_val_loss
    if improved:
        state.best_step, state.best_val_loss = state.step, loss
        save(state, BEST)
    save(state, LAST)
    sample = ""
    if state.config.train.sample_tokens:
        sample = sample_text(state)
        with (state.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {state.step}, validation loss {loss:.4f}\n{sample}\n\n")
    mark = " (best)" if improved else ""
    random = state.evaluation["val_loss_random"]
    windows = "" if random is None else f", {random:.4f} on random windows"
    progress.note(f"step {state.step}: validation loss {loss:.4f}{mark}{windows}")
    return sample


def run_loop(state: State, progress: report.Progress) -> dict[str, Any]:
    """Train from the state's step to the last one, or to a Ctrl-C; returns the result."""
    t, context = state.config.train, state.config.model.context
    tokens, began, trained, sample = t.batch * context, time.perf_counter(), 0.0, ""
    metrics = report.Metrics(state.folder / "metrics.csv", state.step)
    state.model.train()
    try:
        with interruptible() as interrupt:
            while state.step < t.steps and not interrupt.requested:
                start = time.perf_counter()
                x, y = random_batch(state.dataset.train, t.batch, context, t.seed, state.step)
                loss, norm, lr = train_step(state, x.to(state.device), y.to(state.device))
                state.step += 1
                seconds = time.perf_counter() - start
                trained += seconds
                state.step_ms.append(seconds * 1e3)
                ms = recent_ms(state.step_ms)
                evaluating = state.step % t.eval_every == 0 or state.step == t.steps
                keep = evaluating or state.step % max(t.steps // 20, 1) == 0
                progress.update(report.step_line(state.step, t.steps, loss, lr, norm, ms, tokens), keep)
                row: dict[str, Any] = {
                    "step": state.step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "ms": seconds * 1e3,
                }
                row["tokens_per_s"] = tokens / seconds
                if evaluating:
                    sample = evaluate_and_save(state, progress)
                    row |= {k: state.evaluation[k] for k in ("val_loss", "val_loss_random")}
                if evaluating or state.step % t.log_every == 0:
                    metrics.write(row)
            if interrupt.requested and state.step < t.steps:
                save(state, LAST)
    finally:
        metrics.close()
        report.write_loss_svg(state.folder)
    return result_of(state, time.perf_counter() - began, trained, tokens, sample)


def recent_ms(step_ms: list[float]) -> float:
    """Median time of the last steps without the first ones of the process; NaN while there is none."""
    recent = step_ms[WARM_STEPS:][-RECENT_STEPS:]
    return statistics.median(recent) if recent else math.nan


def result_of(state: State, seconds: float, trained: float, tokens: int, sample: str) -> dict[str, Any]:
    """Every figure of a finished run; ms is the median step without the first ones of the process."""
    ms = statistics.median(state.step_ms[WARM_STEPS:] or state.step_ms or [math.nan])
    return {
        "run": str(state.folder),
        "step": state.step,
        "interrupted": state.step < state.config.train.steps,
        # None where a run was stopped before its first evaluation.
        **{k: state.evaluation.get(k) for k in ("val_loss", "val_loss_random", "perplexity", "bits_per_byte")},
        "best_val_loss": state.best_val_loss if state.best_step else None,
        "best_step": state.best_step,
        "seconds": seconds,
        "train_seconds": trained,
        "ms": ms,
        "tokens_per_s": tokens / ms * 1e3,
        "parameters": report.count_parameters(state.model),
        "peak_memory_bytes": report.peak_memory_bytes(),
        "data": state.dataset.source,
        "data_sha256": state.dataset.sha256,
        "sample": sample,
    }


def prepare(config: Config, folder: Path, tokenizer: CharTokenizer | None = None) -> State:
    """Data, model and optimizer of a configuration, before the first step."""
    t = config.train
    if t.threads:
        torch.set_num_threads(t.threads)
    name = t.device if t.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    dataset = load_dataset(t.data, t.val_fraction, config.model.context, tokenizer)
    wanted, needed = config.model.vocab_size, len(dataset.tokenizer)
    if wanted and wanted < needed:
        raise ValueError(f"vocab_size must be at least the data's {needed} characters, got {wanted}: leave it 0")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or needed))
    torch.manual_seed(t.seed)
    model = build_model(config).to(device)
    return State(config, dataset, model, make_optimizer(model, config), device, folder)


def run_folder(config: Config, label: str) -> Path:
    """A new folder for a run: out/name, or out/label-time; ValueError when a named one holds a run already."""
    t = config.train
    if t.name:
        folder = Path(t.out) / t.name
        if (folder / LAST).exists():
            raise ValueError(f"{folder} holds a run: resume it with `train --resume {folder}`, or choose another name=")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stem, attempt = f"{label or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    while True:
        folder = Path(t.out) / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            attempt += 1


def train(config: Config, *, label: str = "", quiet: bool = False) -> dict[str, Any]:
    """Train a new run and return its figures (see result_of): run, val_loss, best_val_loss, ms, sample, ...

    label begins the run folder's name when the configuration has none. Ctrl-C saves and returns with interrupted=True.
    """
    state = prepare(config, Path(config.train.out))  # before a folder exists: a wrong setting leaves none behind
    state.folder = run_folder(config, label)
    return run(state, quiet)


def resume(folder: str | Path, overrides: list[str] | tuple[str, ...] = (), *, quiet: bool = False) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, bit for bit as if it had not stopped; overrides may change [train]."""
    folder = Path(folder)
    payload = load(folder, LAST)
    settings = payload["config"]
    for name, value in map(parse_override, overrides):
        if name.startswith("model.") and value != settings[name]:
            raise ValueError(f"{name} must stay {settings[name]!r} in a resumed run, got {value!r}: train a new one")
        settings[name] = value
    config = build(settings)
    if payload["step"] >= config.train.steps:
        raise ValueError(f"{folder} has done its {payload['step']} steps: give steps= a larger number to go on")
    state = prepare(config, folder, CharTokenizer(payload["characters"]))
    if state.dataset.sha256 != payload["data_sha256"]:
        raise ValueError(
            f"the text must be the run's (sha256 {payload['data_sha256'][:12]}), got {state.dataset.sha256[:12]} from "
            f"{state.dataset.source}: give the same data="
        )
    state.model.load_state_dict(payload["model"])
    state.optimizer.load_state_dict(payload["optimizer"])
    torch.set_rng_state(payload["random_state"])
    state.step, state.best_step, state.best_val_loss = (payload[k] for k in ("step", "best_step", "best_val_loss"))
    return run(state, quiet)


def run(state: State, quiet: bool) -> dict[str, Any]:
    """Write down what the run is, train, and show its cards."""
    config, folder = state.config, state.folder
    progress = report.Progress(quiet)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    parameters = report.count_parameters(state.model)
    report.write_json(folder / "env.json", report.environment(config, state.dataset, parameters))
    progress.note(report.start_card(config, state.dataset, state.model, state.device, folder))
    result = run_loop(state, progress)
    report.write_json(folder / "result.json", result | {"config": flatten(config)})
    if result["interrupted"]:
        progress.note(
            f"stopped after step {state.step}, saved: go on with  gptkernels train --resume {shlex.quote(str(folder))}"
        )
    else:
        prompt = state.dataset.tokenizer.decode(state.dataset.train[:12]).strip().splitlines()[0]
        commands = [
            f"gptkernels sample {shlex.quote(str(folder))} {shlex.quote(prompt)}",
            f"gptkernels train --resume {shlex.quote(str(folder))} steps={2 * config.train.steps}",
            "gptkernels check   # the fast model against the reference",
        ]
        progress.note(report.end_card(result, result["sample"], commands))
    return result
