"""causal_attention: the operator in its two forms, their checks and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptkernels.backend import (
    autocast_dtype,
    autocasts,
    cast,
    check_backward,
    distinct,
    resolve,
    say_fallback,
    wants_gradients,
)
from gptkernels.ops.attention import native, reference

# The widest head whose tiles the kernels keep in the caches or in shared memory.
MAX_HEAD_DIM = 256


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which no token sees a later one.

        out_i = sum over j <= i + S - T of dropout(softmax_j(scale q_i . k_j)) v_j

    Args:
        q: (B, H, T, D), float32 or bfloat16, with triton, cuda and simt float16 too (any floating dtype with backend="reference").
        k, v: (B, H, S, D) in q's dtype. With S > T the queries are the last T tokens (bottom-right alignment); with
            S < T the first T - S queries see no key and give 0. Any strides; a last dimension that is not contiguous is copied.
        scale: factor of the scores, 1/sqrt(D) if None.
        dropout_p: probability of dropping a weight, in [0, 1); kept ones are scaled by 1/(1 - dropout_p).
        seed: key of the dropout mask, an int or a 0-d int64 tensor, needed when dropout_p > 0. Every backend draws the
            same mask: Philox4x32-10 on the absolute (batch, head, row, column).
        deterministic: False allows a backward of one pass, 5 products instead of 7, in which fp32 atomics add up dq in no
            fixed order, so that its last bits vary. triton has one, cuda and simt in 16 bits; the others ignore it, and
            so does everything where torch.use_deterministic_algorithms(True) holds during the forward.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "simt" (all but the reference D <= 256; cuda and simt
            copy inputs whose rows do not start on 16 bytes or whose D is no multiple of 8).
    Returns:
        (B, H, T, D) in q's dtype (autocast's under autocast), token-major in memory: out.transpose(1, 2) is contiguous.
    Raises:
        ValueError: shapes, devices, dropout_p or seed. TypeError: dtypes. RuntimeError: the backend cannot run here.
    Numerics: scores, softmax and sums in fp32. Saved for the backward: the inputs, out, and two fp32 numbers a row. The
        gradients do not depend on the number of threads. A row whose scores are all -inf is 0 in the kernels, as in
        scaled_dot_product_attention, and NaN in the reference.
    Source: Vaswani et al. 2017, arXiv 1706.03762; tiling of Dao et al. 2022, arXiv 2205.14135, and 2023, arXiv 2307.08691.
    """
    check(q, k, v)
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    scale = scale_of(scale, q.shape[-1])
    key = seed_tensor(dropout_p, seed, q.device)
    backend = choose(backend, q)
    if backend == "reference":
        return reference.causal_attention(q, k, v, scale=scale, dropout_p=dropout_p, seed=key)
    if wants_gradients(q, k, v):
        atomics = adds_in_any_order(deterministic, backend, dtype)
        return CausalAttention.apply(backend, *distinct(q, k, v), scale, dropout_p, key, atomics)
    return native.forward(backend, q, k, v, scale, dropout_p, key)[0]


def causal_attention_packed(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """causal_attention on the packed projection, read and differentiated where it lies: no transpose, no split, no copy.

    Args:
        qkv: (B, T, 3, H, D): queries, keys and values of each token; the projection's output (B, T, 3 C) viewed so.
        scale, dropout_p, seed, deterministic, backend: as in causal_attention.
    Returns:
        (B, T, H, D), contiguous: its view (B, T, C) is the next projection's input. The gradient has qkv's layout.
    Raises, numerics and source: as in causal_attention.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv must be (B, T, 3, H, D) with D >= 1, got {tuple(qkv.shape)}: view the projection so")
    if not qkv.is_floating_point():
        raise TypeError(f"qkv must be floating point, got {qkv.dtype}: convert it")
    qkv = cast(qkv, autocast_dtype(qkv))
    scale = scale_of(scale, qkv.shape[-1])
    key = seed_tensor(dropout_p, seed, qkv.device)
    backend = choose(backend, qkv)
    if backend == "reference":
        return reference.causal_attention_packed(qkv, scale=scale, dropout_p=dropout_p, seed=key)
    if wants_gradients(qkv):
        atomics = adds_in_any_order(deterministic, backend, qkv.dtype)
        return CausalAttentionPacked.apply(backend, qkv, scale, dropout_p, key, atomics)
    return native.packed_forward(backend, qkv, scale, dropout_p, key)[0]


def scale_of(scale: float | None, D: int) -> float:
    """What the scores are multiplied by; TypeError for a tensor that would lose its gradient."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            "scale must be a number, got a tensor that requires a gradient: multiply q by it, with scale=1.0"
        )
    return 1.0 / math.sqrt(D) if scale is None else float(scale)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    shape, key_shape = q.shape, k.shape
    fits = len(shape) == len(key_shape) == 4 and key_shape == v.shape
    if not fits or shape[:2] != key_shape[:2] or shape[3] != key_shape[3] or shape[3] == 0:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"q must be (B, H, T, D) and k, v (B, H, S, D) with D >= 1, got {shapes}")
    if not q.is_floating_point() or not (q.dtype == k.dtype == v.dtype or autocasts(q, k, v)):
        raise TypeError(
            f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}: convert them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}: move them")


def choose(backend: str, x: Tensor) -> str:
    """The backend for x's dtype, device and head dim."""
    D = x.shape[-1]
    if D <= MAX_HEAD_DIM or backend == "reference":
        return resolve(backend, x)
    if backend == "auto":
        say_fallback(f"no kernels for a head dim of {D}, over {MAX_HEAD_DIM}")
        return "reference"
    raise ValueError(
        f"backend={backend!r} takes a head dim up to {MAX_HEAD_DIM}, got {D}: use more heads or backend='reference'"
    )


def adds_in_any_order(deterministic: bool, backend: str, dtype: torch.dtype) -> bool:
    """Whether the backward is the one with atomics: where that is allowed, and there is one."""
    if deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return backend == "triton" or (backend in ("cuda", "simt") and dtype != torch.float32)


def seed_tensor(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The mask's key as a 0-d int64 tensor, None without dropout."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        raise ValueError(f"dropout_p={dropout_p} needs seed=, an int or a 0-d int64 tensor: pass one for this step")
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"seed must be a 0-d int64 tensor on {device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int) and not hasattr(seed, "__index__"):  # numpy's; Dynamo cannot ask an int for it
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {seed!r}: a fraction of it would be lost")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits (from -2^63 to 2^63 - 1), got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)  # a GPU is not waited for, as copying would


class CausalAttention(torch.autograd.Function):
    """causal_attention with the native backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
        atomics: bool,
    ) -> Tensor:  # fmt: skip
        out, stats = native.forward(backend, q, k, v, scale, dropout_p, seed)
        ctx.save_for_backward(q, k, v, out, stats, seed)
        ctx.backend, ctx.scale, ctx.dropout_p, ctx.atomics = backend, scale, dropout_p, atomics
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        q, k, v, out, stats, seed = ctx.saved_tensors
        options = ctx.scale, ctx.dropout_p, seed, ctx.atomics
        return None, *native.backward(ctx.backend, dout, q, k, v, out, stats, *options), None, None, None, None


class CausalAttentionPacked(torch.autograd.Function):
    """causal_attention_packed with the native backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, atomics: bool
    ) -> Tensor:
        out, stats = native.packed_forward(backend, qkv, scale, dropout_p, seed)
        ctx.save_for_backward(qkv, out, stats, seed)
        ctx.backend, ctx.scale, ctx.dropout_p, ctx.atomics = backend, scale, dropout_p, atomics
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        qkv, out, stats, seed = ctx.saved_tensors
        options = ctx.scale, ctx.dropout_p, seed, ctx.atomics
        return None, native.packed_backward(ctx.backend, dout, qkv, out, stats, *options), None, None, None, None
