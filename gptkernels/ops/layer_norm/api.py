"""layer_norm: the operator, its checks and its gradient."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from gptkernels.backend import autocast_dtype, check_backward, distinct, resolve, wants_gradients
from gptkernels.ops.layer_norm import native, reference


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, after a residual addition if there is one, in a single pass.

        s = x + residual;   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias      (var is the biased one)

    Args:
        x: (..., C), float32 or bfloat16, with triton, cuda and simt float16 too (any floating dtype with backend="reference").
        weight, bias: (C,) each, or None for 1 and 0; float32 or x's dtype, and the same dtype when both are given.
        eps: added to the variance, positive.
        residual: like x (its dtype may differ: a float32 stream beside a bfloat16 branch), or None.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "simt".
    Returns:
        y in x's dtype (autocast's under autocast); with a residual (y, s), s in the wider dtype of x and residual.
    Raises:
        ValueError: shapes, devices or eps. TypeError: dtypes. RuntimeError: the backend cannot run here.
    Numerics: mean and variance in fp32, two passes over the row (never E[s^2] - E[s]^2); dweight and dbias are summed in
        an order that depends on the shape alone. Inputs that are not contiguous are copied first. Where the variance
        overflows float32 (from |s| of about 1e19 on), a row is its bias (F.layer_norm: that or NaN).
    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """
    check(x, weight, bias, eps, residual)
    dtype = autocast_dtype(x)
    chosen = resolve(backend, x)
    for each in (dtype, x.dtype if residual is None else residual.dtype):
        if each != x.dtype and resolve(backend, x, each) == "reference":
            chosen = "reference"
    if chosen == "reference":
        result = reference.layer_norm(x, weight, bias, eps, residual=residual)
        return result.to(dtype) if isinstance(result, Tensor) else (result[0].to(dtype), result[1])
    if weight is None and bias is not None and bias.dtype != x.dtype:
        weight = torch.ones_like(bias)  # the kernels give dbias in weight's dtype, or x's, which is less than bias has
    if wants_gradients(x, residual, weight, bias):
        function = LayerNorm if residual is None else AddLayerNorm
        return function.apply(chosen, *distinct(x, residual, weight, bias), eps, dtype)
    y, total, _, _ = native.forward(chosen, x, residual, weight, bias, eps, dtype)
    return y if residual is None else (y, total)


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it")
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must be (..., C) with C >= 1, got {tuple(shape)}")
    if isinstance(eps, torch.Tensor) or not (weight is None or isinstance(weight, torch.Tensor)):
        raise TypeError(
            f"weight must be a tensor (C,) or None and eps a number, got {type(weight).__name__} and {type(eps).__name__}: the "
            "order is x, weight, bias, eps, without F.layer_norm's normalized_shape"
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if weight is not None:
        check_vector("weight", weight, shape, dtype, device)
    if bias is not None:
        check_vector("bias", bias, shape, dtype, device)
        if weight is not None and weight.dtype != bias.dtype:
            raise TypeError(
                f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}: convert one of them"
            )
    if residual is not None:
        if residual.shape != shape or residual.device != device:
            raise ValueError(
                f"residual must have x's shape and device, got {tuple(residual.shape)} on {residual.device} "
                f"for {tuple(shape)} on {device}"
            )
        if not residual.is_floating_point():
            raise TypeError(f"residual must be floating point, got {residual.dtype}: convert it")


def check_vector(name: str, vector: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a weight or bias goes with an x of this shape, dtype and device."""
    if vector.shape != (shape[-1],):
        raise ValueError(f"{name} must be ({shape[-1]},) for x {tuple(shape)}, got {tuple(vector.shape)}")
    if vector.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {vector.device}: move one of them")
    if vector.dtype != dtype and vector.dtype != torch.float32:
        or_float = "" if dtype == torch.float32 else " or float32"
        raise TypeError(f"{name} must be in x's dtype {dtype}{or_float}, got {vector.dtype}: convert it")


class LayerNorm(torch.autograd.Function):
    """layer_norm without a residual, with the native backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        _: None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        y, total, mean, rstd = native.forward(backend, x, None, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.backend, ctx.has_bias = backend, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        total, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = native.backward(ctx.backend, dy, None, total, weight, ctx.has_bias, mean, rstd)
        return None, dx, None, None if weight is None else dweight, dbias if ctx.has_bias else None, None, None


class AddLayerNorm(torch.autograd.Function):
    """layer_norm of x + residual, with the native backward: one pass makes the gradient of both."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        # The last block's sum is often not used: its gradient is then None, not a tensor of zeros to be read.
        ctx.set_materialize_grads(False)
        y, total, mean, rstd = native.forward(backend, x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.backend, ctx.has_bias, ctx.dtypes = backend, bias is not None, (x.dtype, residual.dtype, dtype)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward()
        total, weight, mean, rstd = ctx.saved_tensors
        x_dtype, residual_dtype, y_dtype = ctx.dtypes
        if dy is None:
            dy = torch.zeros_like(total, dtype=y_dtype)
        dsum, dweight, dbias = native.backward(ctx.backend, dy, dtotal, total, weight, ctx.has_bias, mean, rstd)
        return (
            None,
            dsum.to(x_dtype),
            dsum.to(residual_dtype),
            None if weight is None else dweight,
            dbias if ctx.has_bias else None,
            None,
            None,
        )
