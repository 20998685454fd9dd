"""gelu_mlp: the operator, its checks and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.backend import autocast_dtype, cast, check_backward, distinct, factor, resolve, wants_gradients
from gptkernels.ops.linear.api import check_bias, check_weight
from gptkernels.ops.mlp import native, reference


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    approximate: str = "tanh",
    backend: str = "auto",
) -> Tensor:
    """The transformer's two-layer perceptron.

        h = x W_fc^T + b_fc;   y = gelu(h) W_proj^T + b_proj
        gelu(h) = h/2 (1 + erf(h/sqrt 2)), or by the tanh formula h/2 (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3)))

    Args:
        x: (..., C), float32 or bfloat16, with triton, cuda and simt float16 too (any floating dtype with backend="reference").
        w_fc: (F, C) and w_proj: (C, F), nn.Linear's layout, in x's dtype or float32 (rounded on the way into the
            product when x is a 16-bit type; their gradients are then float32).
        b_fc: (F,) and b_proj: (C,) in their weight's dtype, or None.
        approximate: "tanh" (GPT-2's weights need it) or "none" (erf).
        backend: "auto", "reference", "cpu", "triton", "cuda" or "simt".
    Returns:
        (..., C) in x's dtype; in autocast's dtype under autocast.
    Raises:
        ValueError: shapes, devices or approximate. TypeError: dtypes. RuntimeError: the backend cannot run here.
    Numerics: products are accumulated in fp32 and GELU is applied to the fp32 sum, where eager bfloat16 rounds
        before it; beside cuBLAS's products (on GPUs from compute capability 9 on, below at some sizes) after rounding too,
        and beside torch's in bfloat16 on a CPU with AMX (backend.bf16_products() is "torch").
        Saved for the backward: x and h; gelu(h) is recomputed there. Beside our own products, results do not depend on the
        number of threads.
    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    check(x, w_fc, b_fc, w_proj, b_proj, approximate)
    dtype = autocast_dtype(x)
    x = cast(x, dtype)
    backend = resolve(backend, x)
    if backend == "reference":
        return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, approximate=approximate)
    tanh = approximate == "tanh"
    w_fc, b_fc = factor(w_fc, dtype), None if b_fc is None else factor(b_fc, dtype)
    w_proj, b_proj = factor(w_proj, dtype), None if b_proj is None else factor(b_proj, dtype)
    if wants_gradients(x, w_fc, b_fc, w_proj, b_proj):
        return GeluMlp.apply(backend, *distinct(x, w_fc, b_fc, w_proj, b_proj), tanh)
    return native.forward(backend, x, w_fc, b_fc, w_proj, b_proj, tanh)[0]


def check(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, approximate: str
) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    fits = x.dim() > 0 and w_fc.dim() == 2 and x.shape[-1] == w_fc.shape[1] and w_proj.shape == w_fc.shape[::-1]
    if not fits:
        shapes = f"{tuple(x.shape)}, {tuple(w_fc.shape)} and {tuple(w_proj.shape)}"
        raise ValueError(f"x must be (..., C), w_fc (F, C) and w_proj (C, F), got {shapes}")
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
    check_weight("w_fc", w_fc, x)
    check_weight("w_proj", w_proj, x)
    if b_fc is not None:
        check_bias("b_fc", b_fc, w_fc, w_fc.shape[0])
    if b_proj is not None:
        check_bias("b_proj", b_proj, w_proj, w_proj.shape[0])


class GeluMlp(torch.autograd.Function):
    """gelu_mlp with the native backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        w_fc: Tensor,
        b_fc: Tensor | None,
        w_proj: Tensor,
        b_proj: Tensor | None,
        tanh: bool,
    ) -> Tensor:
        y, h = native.forward(backend, x, w_fc, b_fc, w_proj, b_proj, tanh)
        ctx.save_for_backward(x, h, w_fc, w_proj)
        ctx.backend = backend
        ctx.has_b_fc, ctx.has_b_proj, ctx.tanh = b_fc is not None, b_proj is not None, tanh
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        x, h, w_fc, w_proj = ctx.saved_tensors
        dx, dw_fc, db_fc, dw_proj, db_proj = native.backward(
            ctx.backend, dy, x, h, w_fc, w_proj, ctx.has_b_fc, ctx.has_b_proj, ctx.tanh
        )
        return None, dx, dw_fc, db_fc if ctx.has_b_fc else None, dw_proj, db_proj if ctx.has_b_proj else None, None
