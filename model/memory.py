"""How much memory a training step needs, before it has run: what a token leaves behind for the backward, by operator."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from model.config import Config
from model.ranks import Ranks, local_count

Backends = Mapping[str, str]
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
WEIGHT_BYTES, TRAINED_BYTES = 4, 12  # fp32: gradient and AdamW's two means
STREAM_BYTES = 4  # the residual stream is fp32 in every dtype


def kept_by_operator(config: Config, backends: Backends) -> dict[str, float]:
    """Bytes that one token leaves in one layer, counted tensor by tensor.

    On our kernels: two residual sums, two norms, q, k, v, attention's output and the MLP's pre-activation, two statistics
    for each head and norm. Plain PyTorch keeps two fp32 rows more for two norms, of GELU what its formula goes through, of
    attention a row of the matrix in each head; in 16 bits these are autocast's of a GPU, which takes powers and softmax
    in fp32 (a CPU's keeps less). recompute leaves what enters the block, and with selective what attention and its
    products gave.
    """
    m, t = config.model, config.train
    C, e = m.n_embd, element_bytes(config)
    entering: dict[str, float] = {"block": C * (STREAM_BYTES + e)}
    if t.recompute == "full":
        return entering
    plain_attention, plain_mlp = is_plain("causal_attention", backends), is_plain("gelu_mlp", backends)
    if t.recompute == "selective":
        entering["linear"] = 4.0 * C * e
        entering["causal_attention"] = 0.0 if plain_attention else C * e + 8.0 * m.n_head
        return entering | ({"gelu_mlp": 5.0 * C * e} if plain_mlp else {})
    # The weights, and what dropout leaves of them beside its mask; in 16 bits the softmax's fp32, and what is multiplied.
    row = m.context * ((9 if m.dropout else 4) if e == 4 else (7 if m.dropout else 6))
    mlp = (20.0 if e == 4 else 16.0) if plain_mlp else float(e)  # an element as wide as the MLP
    return {
        "residual": 2.0 * C * STREAM_BYTES,
        "layer_norm": 2.0 * C * e + (2.0 * C * STREAM_BYTES if is_plain("layer_norm", backends) else 16),
        "linear": 3.0 * C * e,
        "causal_attention": C * e + m.n_head * (row if plain_attention else 8.0),
        "gelu_mlp": 4.0 * C * mlp,
        "dropout": 2.0 * C if m.dropout else 0.0,
    }


def element_bytes(config: Config) -> int:
    """Of what the run computes in."""
    return 2 if config.train.dtype in ("bf16", "fp16") else 4


def is_plain(operator: str, backends: Backends) -> bool:
    """Whether an operator is plain PyTorch's, as all of the reference model are."""
    return backends.get(operator, "reference") == "reference"


def activation_bytes(config: Config, micro: int, backends: Backends) -> int:
    """What the forward of micro sequences keeps for its backward."""
    m, t, e = config.model, config.train, element_bytes(config)
    layer = sum(kept_by_operator(config, backends).values())
    whole = dataclasses.replace(config, train=dataclasses.replace(t, recompute="none"))
    # A backward that computes again holds all of one layer at a time.
    once = sum(kept_by_operator(whole, backends).values()) if t.recompute != "none" else 0.0
    # Around the blocks: the last norm and the head's gradient, of plain PyTorch what the norm divides and the logits.
    rest = m.n_embd * (STREAM_BYTES + e) + 16
    rest += STREAM_BYTES * m.n_embd if is_plain("layer_norm", backends) else 0
    rest += 4 * m.vocab_size if is_plain("linear_cross_entropy", backends) else 0
    return int(micro * m.context * (m.n_layer * layer + once + rest))


def parts_of(config: Config, ranks: Ranks) -> int:
    """On how many ranks weights, gradients and the optimizer's state are spread."""
    return ranks.count if config.train.parallel == "fsdp" else 1


def state_bytes(config: Config, parameters: int, trained: int, ranks: Ranks, micro: int) -> tuple[int, int]:
    """(on a rank's device, in the host's memory with offload=on): weights, gradients, the optimizer's means, the average."""
    parts = parts_of(config, ranks)
    average = WEIGHT_BYTES * parameters if config.train.ema else 0
    own = (WEIGHT_BYTES * parameters + TRAINED_BYTES * trained + average) // parts
    accumulates = micro < config.sequences // ranks.count
    gathered = gathered_bytes(config, parameters, trained, accumulates) if parts > 1 else 0
    return (gathered, own) if config.train.offload else (own + gathered, 0)


def gathered_bytes(config: Config, parameters: int, trained: int, accumulates: bool) -> int:
    """Whole tensors that a rank with parts holds in a step: weights of two blocks at a time and those around the blocks.

    Gradients are whole until they are exchanged: all of them where a step has several micro batches.
    """
    m = config.model
    block = 12 * m.n_embd**2 + (13 if m.bias else 2) * m.n_embd  # projections of attention and MLP, two norms
    weights = parameters - max(m.n_layer - 2, 0) * block
    return WEIGHT_BYTES * (weights + (trained if accumulates else min(weights, trained)))


def host_room() -> int:
    """Bytes of the host's memory that may still be taken, by each of the ranks on it."""
    try:
        lines = dict(line.split(":") for line in MEMORY.read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: what the machine has
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(free, container_room()), 0) // local_count()


def container_room() -> int:
    """Bytes that a container (cgroup v2, else v1) leaves, where it has a limit; what it keeps of files can be dropped."""
    v1 = CGROUP / "memory"
    for limit, used in (
        (CGROUP / "memory.max", CGROUP / "memory.current"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says max
            left = int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))
            kept = dict(
                line.split() for line in limit.with_name("memory.stat").read_text(encoding="ascii").splitlines()
            )
            return left + sum(int(kept.get(name, 0)) for name in ("active_file", "inactive_file"))
    return sys.maxsize


def largest_micro(config: Config, sequences: int, room: int, backends: Backends) -> int:
    """The most of a device's sequences in a forward, dividing them, for which the estimate leaves a fifth of the room."""
    sizes = [n for n in range(sequences, 0, -1) if sequences % n == 0]
    return next((n for n in sizes if activation_bytes(config, n, backends) < 0.8 * room), 1)
