"""Memory for time: what a block's forward would keep for its backward is computed once more there instead.

recompute=full keeps what enters a block alone, a third more work in a step. recompute=selective keeps the results of
attention and of the products around it as well, and makes again what is cheap for its size: norms, dropout, GELU and the
MLP, whose pre-activation is four times as wide as the model (Korthikanti et al. 2022, arXiv 2205.05198, chose by operator
too, for plain attention). Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.fast import FastGPT, Model

# The operators whose results selective keeps: ours by their names in every library, and plain PyTorch's product with a
# weight (bmm is attention's, as large as T x T).
KEPT = {"linear_forward", "attention_forward", "attention_packed_forward", "mm", "addmm"}


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether selective keeps the results of an operator."""
    name = operator.__name__.partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recomputing(mode: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that keeps less."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # dropout is drawn by its seed
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    kept = partial(checkpoint, call, **options)
    return lambda *args: kept(*args) if torch.is_grad_enabled() else call(*args)


def recompute(model: Model, mode: str) -> None:
    """Have every block of a model recompute what its backward needs, by mode: none, selective or full."""
    if mode == "none":
        return
    if isinstance(model, FastGPT):
        model.block = recomputing(mode, model.block)  # type: ignore[method-assign]
        return
    for block in model.transformer.h:
        block.forward = recomputing(mode, block.forward)
