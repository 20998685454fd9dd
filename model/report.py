"""What a run is and what came out of it, in figures and words: start card, step line, end card."""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptkernels.backend import cpu_library
from model.config import Config
from model.data import Dataset
from model.fast import Model
from model.machine import commit, device_name, now
from model.memory import activation_bytes, state_bytes
from model.ranks import Ranks
from model.throughput import flops_a_token, peak_flops


def environment(model: Model, dataset: Dataset, device: torch.device, backends: Mapping[str, str]) -> dict[str, Any]:
    """What a figure of this run depends on beside its configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_library": cpu_library()[0],
        "threads": torch.get_num_threads(),
        "backends": dict(backends),
        "parameters": count_parameters(model),
        "data": dataset.source,
        "data_sha256": dataset.sha256,
        "command": sys.argv,
        "commit": commit(),
        "date": now(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU's tensors, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def count_parameters(model: Model) -> int:
    """Numbers to train; a tied tensor counts once."""
    return sum(p.numel() for p in model.parameters())


def count_trained(model: Model) -> int:
    """Those that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def arithmetic(config: Config) -> str:
    """The words of the arithmetic: dtype, and what else decides which instructions run."""
    t = config.train
    return (
        t.dtype
        + ", tf32 products" * (t.tf32 and t.dtype == "fp32")
        + ", compiled" * t.compile
        + f", recompute {t.recompute}" * (t.recompute != "none")
    )


def count(value: float) -> str:
    """431, 431k, 43.1M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """9.5 MiB, 408 MiB, 3.1 GiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= limit:
            return f"{value / limit:.{0 if value >= 100 * limit else 1}f} {unit}"
    return f"{value / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """9.5s, 3m01s, 2h05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds) // 60
    return f"{minutes}m{int(seconds) % 60:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def number(value: float | None) -> str:
    """Four digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.4f}"


def describe_backends(backends: Mapping[str, str], device: str) -> str:
    """Operators by the backend that they get on a device, "cpu" or "cuda"; the reference model has none."""
    by_backend: dict[str, list[str]] = {}
    for operator, backend in backends.items():
        by_backend.setdefault(backend, []).append(operator)
    how = {"triton": "interpreted, slow: ", "simt": "emulated, slow: "} if device == "cpu" else {}
    parts = [f"{backend} ({how.get(backend, '')}{', '.join(names)})" for backend, names in by_backend.items()]
    return "; ".join(parts) or "none: model=reference is plain PyTorch"


def start_card(
    config: Config,
    dataset: Dataset,
    model: Model,
    device: torch.device,
    backends: Mapping[str, str],
    micro: int,
    ranks: Ranks,
    folder: Path,
) -> str:
    """What is about to be trained, on what and with what."""
    m, t = config.model, config.train
    parameters, trained, threads = count_parameters(model), count_trained(model), torch.get_num_threads()
    state, host = state_bytes(config, parameters, trained, ranks, micro)
    activations = activation_bytes(config, micro, backends)
    tokens = f"{config.sequences} x {m.context} = {config.sequences * m.context:,} tokens"
    if (splits := config.sequences // ranks.count // micro) > 1:
        tokens += f" in {splits} micro batches of {micro}"
    if ranks.count > 1:
        tokens += f" on each of {ranks.count} ranks ({t.parallel})"
    peak = peak_flops(device, t.dtype, t.tf32)
    roof = f", peak {peak / 1e12:.4g} TFLOP/s for MFU" if peak else ""
    processor = f"{device}, {device_name(device)}"
    rows = [
        ("model", f"{t.model}, {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, context {m.context}"),
        ("parameters", f"{parameters:,}" + f", of them trained {trained:,}" * (trained < parameters)),
        ("step", f"{tokens}, {count(flops_a_token(config))} FLOPs a token, {arithmetic(config)}"),
        (
            "memory",
            f"about {size(state + activations)}: weights, gradients, AdamW {size(state)}, kept activations "
            f"{size(activations)} (beside Python and torch)" + f"; of the host's {size(host)}" * (host > 0),
        ),
        ("device", processor + roof + (f", {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else "")),
        ("backends", describe_backends(backends, device.type)),
        ("data", f"{dataset.source}, {dataset.tokenizer.description}, sha256 {dataset.sha256[:12]}"),
        ("split", f"{len(dataset.train):,} tokens to train on, {len(dataset.val):,} to validate"),
        ("seed", str(t.seed)),
        ("run folder", str(folder)),
    ]
    return "\n".join(f"{name:>12}  {text}" for name, text in rows)


def step_figures(
    row: Mapping[str, Any], steps: int, ms: float | None, tokens: int, memory: int, mfu: float | None
) -> dict[str, str]:
    """The state after a step by names; ms is the recent time of a step, left out until there is one, as mfu is."""
    step = row["step"]
    figures = {
        "step": f"step {step}/{steps} {100 * step // steps}%",
        "loss": f"loss {row['loss']:.4f}",
        "lr": f"lr {row['lr']:.1e}",
        "gnorm": f"gnorm {row['grad_norm']:.2f}",
    }
    if ms is not None:
        figures |= {"ms": f"{ms:.1f} ms", "speed": f"{count(tokens / ms * 1e3)} tok/s"}
    if mfu is not None:
        figures["mfu"] = f"MFU {100 * mfu:.1f}%"
    figures["memory"] = size(memory)
    if ms is not None:
        figures["eta"] = f"eta {duration((steps - step) * ms / 1e3)}"
    return figures


def end_card(result: Mapping[str, Any], commands: Sequence[str]) -> str:
    """What came out, and what to do with it."""
    mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f}%"
    files = sorted(path.name for path in Path(result["run"]).iterdir() if not path.name.startswith("."))
    rows = [
        (
            "validation",
            f"final {result['val_loss']:.4f}, best {number(result['best_val_loss'])} at step {result['best_step']}; "
            f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits a byte (whole validation part)",
        ),
        ("nanoGPT's way", f"{number(result['val_loss_random'])} (random windows)"),
        ("time", f"{duration(result['seconds'])}, of it training {duration(result['train_seconds'])}"),
        ("speed", f"{result['ms']:.2f} ms a step (median), {count(result['tokens_per_s'])} tokens/s{mfu}"),
        (
            "peak memory",
            f"{size(result['peak_memory_bytes'])} (estimated {size(result['estimated_memory_bytes'])} and torch)",
        ),
        ("run folder", f"{result['run']} ({', '.join(files)})"),
    ]
    card = "\n".join(f"{name:>14}  {text}" for name, text in rows)
    if result["sample"]:
        card += f"\n\n{result['sample']}"
    return card + "\n\nnext:\n" + "\n".join(f"  {command}" for command in commands)


def next_commands(folder: Path, dataset: Dataset, config: Config, resume: str) -> list[str]:
    """What to do with a finished run, resume being how to go on; the prompt is how the text itself begins."""
    run = shlex.quote(str(folder))
    lines = dataset.tokenizer.decode(dataset.train[:200]).splitlines()
    prompt = next((line.strip() for line in lines if line.strip()), dataset.tokenizer.start)[:20]
    return [
        f"gptkernels sample {run} {shlex.quote(prompt)}",
        f"{resume} steps={2 * config.train.steps}",
        f"gptkernels check {run}   # the fast model against the reference, on these weights",
    ]
