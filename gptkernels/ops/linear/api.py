"""linear: the operator, its checks and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.backend import autocast_dtype, cast, check_backward, distinct, factor, resolve, wants_gradients
from gptkernels.ops.linear import native, reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Affine map of the last dimension.

        y = x W^T + b

    Args:
        x: (..., C_in), float32 or bfloat16, with triton, cuda and simt float16 too (any floating dtype with backend="reference").
        weight: (C_out, C_in), nn.Linear's layout, in x's dtype or float32; a float32 weight beside a bfloat16 x is
            rounded on its way into the product, and its gradient is float32 (so autocast needs no copy of it).
        bias: (C_out,) in weight's dtype, or None.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "simt".
    Returns:
        (..., C_out) in x's dtype; in autocast's dtype under autocast.
    Raises:
        ValueError: shapes or devices that do not fit. TypeError: dtypes. RuntimeError: the backend cannot run here.
    Numerics: products are accumulated in fp32; in bfloat16 both factors are bfloat16 and y is rounded once. The result
        does not depend on the number of threads, but where backend.bf16_products() is "torch" (a CPU with AMX): there its
        product is rounded before the bias is added, and once more after. Inputs that are not contiguous are copied first.
    """
    check(x, weight, bias)
    dtype = autocast_dtype(x)
    x = cast(x, dtype)
    backend = resolve(backend, x)
    if backend == "reference":
        return reference.linear(x, weight, bias)
    weight, bias = factor(weight, dtype), None if bias is None else factor(bias, dtype)
    if wants_gradients(x, weight, bias):
        return Linear.apply(backend, *distinct(x, weight, bias))
    return native.forward(backend, x, weight, bias)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., C_in) and weight (C_out, C_in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_weight("weight", weight, x)
    if bias is not None:
        check_bias("bias", bias, weight, weight.shape[0])


def check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    """Raise unless a weight's dtype and device go with x."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it")
    if weight.dtype not in (x.dtype, torch.float32, autocast_dtype(x)):
        or_float = "" if x.dtype == torch.float32 else " or float32"
        raise TypeError(f"{name} must be in x's dtype {x.dtype}{or_float}, got {weight.dtype}: convert one of them")
    if weight.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {weight.device}: move one of them")


def check_bias(name: str, bias: Tensor, weight: Tensor, size: int) -> None:
    """Raise unless a bias is a vector of the size, like its weight."""
    if tuple(bias.shape) != (size,):
        raise ValueError(f"{name} must be ({size},), got {tuple(bias.shape)}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"{name} must have its weight's dtype {weight.dtype}, got {bias.dtype}: convert one of them")
    if bias.device != weight.device:
        raise ValueError(f"{name} must be on its weight's device {weight.device}, got {bias.device}: move one of them")


class Linear(torch.autograd.Function):
    """linear with the native backward."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.has_bias = backend, bias is not None
        return native.forward(backend, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = native.backward(ctx.backend, dy, x, weight, ctx.has_bias)
        return None, dx, dweight, dbias if ctx.has_bias else None
