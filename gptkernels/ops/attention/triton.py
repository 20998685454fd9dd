"""The raw attention operators in Triton: tile choices and launches. The kernels are in the two files beside this one."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from gptkernels.ops.attention.triton_backward import key_gradient_kernel, query_gradient_kernel, row_terms_kernel
from gptkernels.ops.attention.triton_forward import attention_forward_kernel

# Offsets within a tile in 64 bits even where 32 would do: for tests on small tensors.
FORCE_INT64 = False
# Shared memory of a block on sm_80, taken for tensors that are on no GPU (interpreter, emulator).
DEFAULT_SHARED_MEMORY = 163 * 1024
# Below this much (sm_86, 89 and 120 have 99 KiB) the widest heads get smaller tiles.
LARGE_SHARED_MEMORY = 110 * 1024
# Longest block of rows: what a tile's offsets are bounded by.
MAX_BLOCK = 128

# Tiles follow the 255 registers of a thread: with 4 warps a warp owns 32 rows of a 128-row tile, the fewest for which a
# shared-memory read feeds enough products (16 rows: 2 shared cycles a product, 32 rows: 1), and accumulators of 32 x 128
# take half of the registers. That leaves scores of 32 columns at D = 128 and of 64 at D = 64. Two stages: a third one
# leaves room for one block a multiprocessor instead of two at D = 128, and costs 4 % more instructions at D = 64.


def tile(block_m: int, block_n: int, part: int, D: int, num_warps: int = 4, num_stages: int = 2) -> dict[str, Any]:
    """Constants of a kernel's tile. Its D columns come in parts: powers of two, 16 at least, all but the last one equal."""
    rest = D % part
    widths = (part,) * (D // part) + ((max(16, 1 << (rest - 1).bit_length()),) if rest else ())
    return {
        "WIDTHS": widths, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


@functools.cache
def forward_tiles(dtype: torch.dtype, D: int, shared_memory: int) -> dict[str, Any]:
    """Tile of the forward."""
    if dtype == torch.float32:
        return tile(32, 32, 64, D)
    if D <= 64:
        return tile(128, 64, 32, D, num_stages=3)
    return tile(128, 32, 64, D) if D <= 128 else tile(64, 32, 64, D)


@functools.cache
def query_gradient_tiles(dtype: torch.dtype, D: int, shared_memory: int) -> dict[str, Any]:
    """Tile of dq, whose rows of q and dout stay in shared memory."""
    if dtype == torch.float32:
        return tile(32, 32 if D <= 128 else 16, 64, D)
    return tile(128, 32, 64, D) if D <= 128 else tile(64, 32, 64, D)


@functools.cache
def key_gradient_tiles(dtype: torch.dtype, D: int, shared_memory: int) -> dict[str, Any]:
    """Tile of dk and dv. Both have D columns: above 64, 16 rows a warp; above 128 a warp has part of the columns instead."""
    if dtype == torch.float32:
        return tile(32 if D <= 128 else 16, 32, 64, D)
    if D <= 64:
        return tile(32, 128, 64, D)
    if D <= 128:
        return tile(32, 128, 128 if D > 96 else 64, D, num_warps=8)
    return tile(64, 32 if shared_memory >= LARGE_SHARED_MEMORY else 16, 64, D)


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a block of the device may have."""
    if device.type != "cuda":
        return DEFAULT_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The least word that keeps, as a signed 32-bit integer, and the factor of what is kept."""
    threshold = math.floor(dropout_p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)


@functools.lru_cache(maxsize=4096)
def options(
    tiles: Any, dtype: torch.dtype, D: int, memory: int, check_t: bool, check_s: bool, unit: int, dropout: bool, int64: bool, tf32: bool,
    atomics: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All that a kernel is compiled for, but the strides. Cached: a dict of 12 built anew costs as much as a launch."""
    chosen: dict[str, Any] = tiles(dtype, D, memory) | {
        "D": D,
        "UNIT": unit,
        "CHECK_T": check_t,
        "CHECK_S": check_s,
        "DROPOUT": dropout,
        "INT64": int64,
        "PRECISION": "tf32" if tf32 else "ieee",
        "enable_fp_fusion": True,
    }
    return chosen if atomics is None else chosen | {"ATOMICS": atomics}


def kernel_options(
    tiles: Any, x: Tensor, S: int, memory: int, unit: int, dropout: bool, longest: int, atomics: bool | None = None
) -> dict[str, Any]:
    """options() of a kernel for queries x (.., T, D), with the longest token stride."""
    T, D = x.shape[2:]
    block = tiles(x.dtype, D, memory)
    return options(
        tiles, x.dtype, D, memory, T % block["BLOCK_M"] != 0, S % block["BLOCK_N"] != 0, unit, dropout,
        FORCE_INT64 or MAX_BLOCK * longest >= 2**31, x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32, atomics,
    )  # fmt: skip


def launch(kernel: Any, programs: int, device: torch.device, arguments: tuple, constants: dict[str, Any]) -> None:
    """Run the kernel on the tensors' device, which need not be the current one."""
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


def unit_of(dtype: torch.dtype, *strides: tuple[int, ...]) -> int:
    """Elements of 16 bytes if they divide every stride but the last ones, so that loads are as wide; else 1."""
    unit, bits = 16 // dtype.itemsize, 0
    for b, h, t, _ in strides:
        bits |= b | h | t
    return 1 if bits % unit else unit


def forward_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Write the token-major `out`; returns stats."""
    B, H, T, D = q.shape
    S, device, memory = k.shape[2], q.device, shared_memory_of(q.device)
    stats = torch.empty((B, H, T, 2), dtype=torch.float32, device=device)
    if scale < 0.0:
        q, scale = -q, -scale  # the kernel's maximum is that of the products before the scale
    qs, ks, vs = q.stride(), k.stride(), v.stride()
    unit = unit_of(q.dtype, qs, ks, vs)
    threshold, keep_scale = dropout_arguments(dropout_p)
    constants = kernel_options(forward_tiles, q, S, memory, unit, dropout_p > 0.0, max(qs[2], ks[2], vs[2], H * D))
    # A scale of 0 would make NaN of the mask's -inf.
    arguments = (
        q, k, v, out, stats, q if seed is None else seed,
        qs[0] // unit, qs[1] // unit, ks[0] // unit, ks[1] // unit, vs[0] // unit, vs[1] // unit,
        H, T, S, max(scale, 1e-30), threshold, keep_scale, qs[2], ks[2], vs[2],
    )  # fmt: skip
    launch(attention_forward_kernel, B * H * -(-T // constants["BLOCK_M"]), device, arguments, constants)
    return stats


def backward_into(
    gradients: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool,
) -> None:
    """Write dq, dk and dv, of which dk and dv have the same strides."""
    dq, dk, dv = gradients
    B, H, T, D = q.shape
    S, device, memory = k.shape[2], q.device, shared_memory_of(q.device)
    strides = gs, qs, ks, vs, os, dqs, dks = [x.stride() for x in (dout, q, k, v, out, dq, dk)]
    unit = unit_of(q.dtype, *strides)
    flat = [n // unit for s in strides for n in s[:2]]
    longest = max(s[2] for s in strides)
    dropout, (threshold, keep_scale) = dropout_p > 0.0, dropout_arguments(dropout_p)
    numbers = (H, T, S, scale, threshold, keep_scale)
    terms = torch.empty((B, H, 2, T), dtype=torch.float32, device=device)
    seed = q if seed is None else seed
    dq_sum = dq
    if atomics:
        dq_sum = torch.zeros((B, H, T, D), dtype=torch.float32, device=device)
        row_terms(dout, out, stats, terms, unit, memory)
    else:
        constants = kernel_options(query_gradient_tiles, q, S, memory, unit, dropout, longest)
        arguments = (
            dout, q, k, v, out, stats, terms, dq, seed, *flat[:12], *numbers, gs[2], qs[2], ks[2], vs[2], os[2], dqs[2],
        )  # fmt: skip
        launch(query_gradient_kernel, B * H * -(-T // constants["BLOCK_M"]), device, arguments, constants)
    constants = kernel_options(key_gradient_tiles, q, S, memory, unit, dropout, longest, atomics)
    arguments = (
        dout, q, k, v, terms, dq_sum, dk, dv, seed, *flat[:8], *flat[12:], *numbers, gs[2], qs[2], ks[2], vs[2], dks[2],
    )  # fmt: skip
    launch(key_gradient_kernel, B * H * -(-S // constants["BLOCK_N"]), device, arguments, constants)
    if atomics:
        dq.copy_(dq_sum.mul_(scale))


def row_terms(dout: Tensor, out: Tensor, stats: Tensor, terms: Tensor, unit: int, memory: int) -> None:
    """Write terms (B, H, 2, T): lse and delta of each row."""
    B, H, T, D = dout.shape
    gs, os = dout.stride(), out.stride()
    tiles = query_gradient_tiles(dout.dtype, D, memory)
    constants = {
        "D": D,
        "WIDTHS": tiles["WIDTHS"],
        "BLOCK_M": 32,
        "UNIT": unit,
        "INT64": FORCE_INT64 or 32 * max(gs[2], os[2]) >= 2**31,
    }
    flat = (gs[0] // unit, gs[1] // unit, os[0] // unit, os[1] // unit)
    arguments = (dout, out, stats, terms, *flat, H, T, gs[2], os[2])
    launch(row_terms_kernel, B * H * -(-T // 32), dout.device, arguments, constants)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (token-major in memory) and stats (B, H, T, 2) fp32: each row's largest score and its sum of exponentials."""
    B, H, T, D = q.shape
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    return out.transpose(1, 2), forward_into(out, q, k, v, scale, dropout_p, seed)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. With `atomics` in one pass of 5 products instead of 7, whose sums have no fixed order."""
    dq, dk, dv = gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward_into(gradients, dout, q, k, v, out, stats, scale, dropout_p, seed, atomics)
    return dq, dk, dv


def attention_packed_forward(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and stats, as attention_forward, of qkv (B, T, 3, H, D)."""
    B, T, _, H, D = qkv.shape
    out = torch.empty((B, T, H, D), dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return out, forward_into(out, q, k, v, scale, dropout_p, seed)


def attention_packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool = False,
) -> Tensor:
    """dqkv in qkv's layout."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    dq, dk, dv = dqkv.permute(2, 0, 3, 1, 4).unbind()
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    backward_into((dq, dk, dv), dout, q, k, v, out, stats, scale, dropout_p, seed, atomics)
    return dqkv
