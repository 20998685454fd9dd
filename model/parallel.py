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

from model.fast import FastGPT, Model


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


def replicate(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """DDP around a model or its compiled form."""
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)


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
