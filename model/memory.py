"""How much memory a training step needs, before it has run: what a token leaves behind for the backward, by operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from model.config import Config

Backends = Mapping[str, str]
# Weight, gradient and AdamW's two means, fp32 each.
STATE_BYTES = 16
STREAM_BYTES = 4  # the residual stream is fp32 in every dtype


def kept_by_operator(config: Config, backends: Backends) -> dict[str, float]:
    """Bytes that one token leaves in one layer, counted tensor by tensor.

    On our kernels: two residual sums, two norms, q, k, v, attention's output and the MLP's pre-activation, two statistics
    for each head and norm. Plain PyTorch keeps every step of every formula: about 30 C, a row of the attention matrix in
    each head. recompute leaves what enters the block, and with selective what attention and its products gave.
    """
    m, t = config.model, config.train
    C, e = m.n_embd, 2 if t.dtype in ("bf16", "fp16") else 4
    entering: dict[str, float] = {"block": C * (STREAM_BYTES + e)}
    ours = bool(set(backends.values()) - {"reference"})
    if t.recompute == "full":
        return entering
    if t.recompute == "selective":
        more = {} if ours else {"gelu_mlp": 5.0 * C * e}
        return entering | {"linear": 4.0 * C * e, "causal_attention": C * e + 8.0 * m.n_head} | more
    if ours:
        return {
            "residual": 2.0 * C * STREAM_BYTES,
            "layer_norm": 2.0 * C * e + 16,
            "linear": 3.0 * C * e,
            "causal_attention": C * e + 8.0 * m.n_head,
            "gelu_mlp": 4.0 * C * e,
            "dropout": 2.0 * C if m.dropout else 0.0,
        }
    matrices = 1 + (2.25 if m.dropout else 0.0)
    return {"formulas": 120.0 * C, "attention matrices": 4.0 * matrices * m.n_head * m.context}


def activation_bytes(config: Config, micro: int, backends: Backends) -> int:
    """What the forward of micro sequences keeps for its backward."""
    m, t = config.model, config.train
    e = 2 if t.dtype in ("bf16", "fp16") else 4
    ours = bool(set(backends.values()) - {"reference"})
    layer = sum(kept_by_operator(config, backends).values())
    whole = dataclasses.replace(config, train=dataclasses.replace(t, recompute="none"))
    # A backward that computes again holds all of one layer at a time.
    once = sum(kept_by_operator(whole, backends).values()) if t.recompute != "none" else 0.0
    # Around the blocks: the last norm and the head's gradient, or the logits of plain PyTorch.
    rest = m.n_embd * (STREAM_BYTES + e) + 16 if ours else 12.0 * m.n_embd + 4.0 * m.vocab_size
    return int(micro * m.context * (m.n_layer * layer + once + rest))


def state_bytes(config: Config, parameters: int) -> int:
    """Weights, gradients, the optimizer's means and the moving average."""
    return parameters * (STATE_BYTES + (4 if config.train.ema else 0))


def largest_micro(config: Config, sequences: int, room: int, backends: Backends) -> int:
    """The most of a device's sequences in a forward, dividing them, for which the estimate leaves a fifth of the room."""
    sizes = [n for n in range(sequences, 0, -1) if sequences % n == 0]
    return next((n for n in sizes if activation_bytes(config, n, backends) < 0.8 * room), 1)
