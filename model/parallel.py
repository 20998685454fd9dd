"""One model on many devices: DDP, where each holds it all, or FSDP2, where each holds a part of every tensor.

Both make the mean over ranks of the gradients, once a step: micro batches before the last one are summed locally. Li et
al. 2020, arXiv 2006.15704; Zhao et al. 2023, arXiv 2304.11277.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.fast import FastGPT, Model
from model.lora import add_lora
from model.memory import WEIGHT_BYTES, gathered_bytes
from model.recompute import recompute
from model.reference import GPT


def shard(model: Model, offload: bool = False) -> None:
    """FSDP2: the parameters become parts; a block's are gathered for its forward and backward alone.

    offload keeps the parts, their gradients and so the optimizer and its state in the host's memory, and copies a block's
    to the device for each use. For ranks on a CPU that is where they are anyway: the same numbers, nothing saved.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

    # Only pinned memory is copied while a GPU computes.
    pinned = model.lm_head.weight.device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for layer, block in enumerate(model.transformer.h):
        fully_shard(block, offload_policy=policy)
        if isinstance(model, FastGPT):
            # The fast model's blocks are no modules: the module of the same parameters gathers them around the call.
            vars(block)["fast"] = partial(model.block, layer)
            register_fsdp_forward_method(block, "fast")
    fully_shard(model, offload_policy=policy)
    if isinstance(model, FastGPT):
        model.block = lambda layer, *args: model.transformer.h[layer].fast(*args)  # type: ignore[method-assign]


def stand_in(model: Model, config: Config, device: torch.device, accumulates: bool) -> Model:
    """What takes the memory of a sharded model's forward and backward, and no other rank: all of its blocks are one."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.device("meta"):
        other = FastGPT(model.config, backend=model.backend) if isinstance(model, FastGPT) else GPT(model.config)
    if config.lora.rank:
        add_lora(other, config.lora)
    recompute(other, config.train.recompute)
    blocks = other.transformer.h
    for layer in range(1, len(blocks)):
        blocks[layer] = blocks[0]
    other.to_empty(device=device)
    if model.config.tie:
        other.lm_head.weight = other.transformer.wte.weight
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    own = 2 * WEIGHT_BYTES * sum(p.numel() for p in other.parameters())  # and their gradients
    rest = max(gathered_bytes(config, count, trained, accumulates) - own, 0)
    other.register_buffer("rest", torch.empty(rest, dtype=torch.uint8, device=device), persistent=False)
    return other


def replicate(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """DDP around a model or its compiled form."""
    ids = [device.index] if device.type == "cuda" else None
    # Buffers are constants, and a forward without exchanges can fail on one rank alone.
    return torch.nn.parallel.DistributedDataParallel(
        forward, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def synchronising(forward: Callable[..., Any], last: bool) -> AbstractContextManager[Any]:
    """Around the forward and backward of a micro batch: the ranks exchange gradients in the last one only."""
    if isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        return nullcontext() if last else forward.no_sync()
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(last)
    return nullcontext()


def is_part(value: Any) -> bool:
    """Whether a tensor is one of FSDP's. Asked so, since the import of its class takes seconds that most runs can spare."""
    return hasattr(value, "full_tensor")


def like(x: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as x is: cut into parts where x is one."""
    if not is_part(x):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part: Any = x
    return distribute_tensor(whole.to(x.device), part.device_mesh, part.placements)


def whole_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of the gradient, with the parts of all ranks where they hold parts."""
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if is_part(norm) else norm
