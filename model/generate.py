"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor

from model.cached import CachedGPT
from model.fast import FastGPT, Model


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError unless the settings make a distribution."""
    if not temperature >= 0:  # nor NaN
        raise ValueError(f"temperature must be 0 (the likeliest token) or positive, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or positive, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def next_token_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(V,) probabilities: logits (V,) sharpened by the temperature, then cut to the top k and to the nucleus p.

    The nucleus is the fewest likeliest tokens that together have probability p (Holtzman et al. 2019, arXiv 1904.09751).
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(0, logits.argmax(keepdim=True), 1.0)
    # Subtracting the largest first keeps a tiny temperature from overflowing to inf - inf.
    logits = (logits - logits.max()) / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities, order = torch.softmax(logits, dim=0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def generate(
    model: Model,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    vocabulary: int | None = None,
    keep: bool = True,
) -> Iterator[int]:
    """Yield `tokens` new tokens after the prompt (T,) int64; the model sees the last `context` of all.

    vocabulary is how many tokens have a meaning: a head padded beyond them is never asked for the rest. The same model,
    prompt, settings and seed give the same tokens. The model is in eval mode while it is asked. keep lets a FastGPT keep keys
    and values (model/cached.py), but none with other methods or hooks of its own; False computes all of them each time.
    """
    check_sampling(temperature, top_k, top_p)
    if len(prompt) == 0:
        raise ValueError("the prompt must hold at least one token, got none: give a character to start from")
    rng = torch.Generator().manual_seed(seed)
    return sample_tokens(model, prompt, tokens, vocabulary, (temperature, top_k, top_p), rng, keep)


def logits_after(model: Model, keep: bool) -> Callable[[Tensor], Tensor]:
    """A function from tokens (T,) to the logits (words,) of the next one."""
    if keep and as_written(model):
        return CachedGPT(model).after
    return lambda tokens: model(tokens[None])[0][0, -1]


def as_written(model: Model) -> TypeGuard[FastGPT]:
    """Whether a model computes what FastGPT says: no subclass, as FSDP makes too, no method of the object's own, no hook."""
    changed = any(callable(getattr(FastGPT, name, None)) for name in vars(model))
    return type(model) is FastGPT and not changed and not model._forward_hooks and not model._forward_pre_hooks


def sample_tokens(
    model: Model,
    prompt: Tensor,
    tokens: int,
    vocabulary: int | None,
    sampling: tuple[float, int, float],
    rng: torch.Generator,
    keep: bool,
) -> Iterator[int]:
    """The loop of `generate`."""
    window = prompt[-model.config.context :]
    training = model.training
    try:
        model.eval()
        after = logits_after(model, keep)
        for _ in range(tokens):
            with torch.no_grad():  # entered anew each time: a generator must not leave it on while suspended
                logits = after(window)[:vocabulary]
            probabilities = next_token_probabilities(logits.float().cpu(), *sampling)
            token = torch.multinomial(probabilities, 1, generator=rng)
            window = torch.cat((window, token.to(window.device)))[-model.config.context :]
            yield int(token)
    finally:
        model.train(training)
