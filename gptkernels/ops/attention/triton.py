"""The raw attention operators in Triton: tile choices and launches. The kernels are in the two files beside this one."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from gptkernels.ops.attention.triton_backward import key_gradient_kernel, query_gradient_kernel, row_terms_kernel
from gptkernels.ops.attention.triton_forward import attention_forward_kernel
from gptkernels.triton_launch import Plan, limits

# Offsets within a tile in 64 bits even where 32 would do: for tests on small tensors.
FORCE_INT64 = False
# Longest block of rows: what a tile's offsets are bounded by.
MAX_BLOCK = 128

Strides = tuple[int, ...]

# Tiles follow the 255 registers of a thread. With mma.sync (sm_80, 86, 89, 120) operands pass through registers: a warp
# wants 32 rows, for which a shared-memory read feeds enough products (1 shared cycle a product; 2 with 16 rows), so 4
# warps take 128 rows, and their accumulators of 32 x 128 leave room for scores of 32 columns at D = 128, of 64 at D = 64.
# Where the operand that does not stream fits in registers too it is held there (16 rows of k and v beside dk and dv at
# D = 128): shared memory is then read for the streams alone.
# Dropout needs registers for its words, so smaller tiles. Two stages: a third leaves room for one block a multiprocessor
# instead of two at D = 128. All fit the 99 KiB of sm_86.
# sm_90 and 100, told by their shared memory, read operands from there. Timed on an H200 among 62 tiles (B H T D = 16 12 1024
# 64 and 4 16 4096 128): 64 rows in 4 warps, one wgmma's, beat 128 rows in 8 by 1.1 forward and 1.2 to 1.35 backward; but for
# dq at D = 128, whose 8 warps with a third stage do.
WIDE_SHARED_MEMORY = 200 * 1024
# sm_86, 89 and 120 have less, and slower tensor cores, which smaller tiles feed as well (and ptxas for sm_120 spills where
# it does not for sm_80).
DATA_CENTRE_SHARED_MEMORY = 128 * 1024
# float32's products have chains of FMAs of this length: with one of 200, dq erred by three times what MKL's errs.
FLOAT_PART = 32


def widths(part: int, D: int) -> tuple[int, ...]:
    """Parts of D columns: powers of two, 16 at least, all but the last one equal."""
    rest = D % part
    return (part,) * (D // part) + ((max(16, 1 << (rest - 1).bit_length()),) if rest else ())


def tile(
    block_m: int, block_n: int, part: int, D: int, num_warps: int = 4, num_stages: int = 2, held: bool = False
) -> dict[str, Any]:
    """Constants of a kernel's tile, whose D columns come in parts."""
    return {
        "WIDTHS": widths(part, D), "BLOCK_M": block_m, "BLOCK_N": block_n, "HELD": held, "num_warps": num_warps,
        "num_stages": num_stages,
    }  # fmt: skip


def part_of(D: int) -> int:
    """The widest part that pads no more than half of it."""
    return 64 if D <= 96 else 128


@functools.cache
def forward_tiles(dtype: torch.dtype, D: int, shared_memory: int, dropout: bool = False) -> dict[str, Any]:
    """Tile of the forward; V_WIDTHS are the parts of v and of the accumulator."""
    tiles = score_tiles(dtype, D, shared_memory, dropout)
    if dtype != torch.float32 and shared_memory < WIDE_SHARED_MEMORY and 64 < D <= 128:
        # ldmatrix finds a part of 32 columns by half the registers of a wider one, with which Triton 3.7 spilled.
        return tiles | {"V_WIDTHS": widths(32, D)}
    return tiles | {"V_WIDTHS": tiles["WIDTHS"]}


def score_tiles(dtype: torch.dtype, D: int, shared_memory: int, dropout: bool) -> dict[str, Any]:
    """What the forward's q and k come in."""
    if dtype == torch.float32:
        return tile(32, 32, FLOAT_PART, D) if D <= 128 else tile(32, 16, FLOAT_PART, D, num_warps=8)
    if shared_memory >= WIDE_SHARED_MEMORY:
        if D <= 128:
            return tile(64, 64, part_of(D), D, num_stages=3)
        return tile(128, 32 if dropout else 64, 128, D, num_warps=8)
    if D <= 64:
        return tile(128, 32, 64, D, num_stages=3) if dropout else tile(128, 64, 32, D, held=True)
    if D <= 128:
        if dropout:
            return tile(64, 32, 128, D)
        return tile(128, 32, part_of(D), D) if shared_memory >= DATA_CENTRE_SHARED_MEMORY else tile(64, 64, 64, D)
    return tile(64, 16, 64, D)


@functools.cache
def query_gradient_tiles(
    dtype: torch.dtype, D: int, shared_memory: int, dropout: bool = False, tensor_memory: bool = False
) -> dict[str, Any]:
    """Tile of dq, whose rows of q and dout stay in shared memory.

    With tensor memory ptxas gives a thread 128 registers here, one word too few for sm_90's tiles.
    """
    if dtype == torch.float32:
        return tile(32, 32, FLOAT_PART, D) if D <= 128 else tile(32, 16, FLOAT_PART, D, num_warps=8)
    if shared_memory >= WIDE_SHARED_MEMORY:
        if D <= 64:
            return tile(64, 64, 64, D, num_stages=3)
        if D <= 128:
            return tile(128, 64, part_of(D), D, num_warps=8, num_stages=2 if tensor_memory else 3)
        return tile(64, 32 if dropout or tensor_memory else 64, 128, D, num_warps=8)
    if D <= 64:
        return tile(128, 32, 32 if dropout else 64, D, held=not dropout and shared_memory >= DATA_CENTRE_SHARED_MEMORY)
    if D <= 128:
        roomy = not dropout and shared_memory >= DATA_CENTRE_SHARED_MEMORY
        return tile(128, 32, 32, D) if roomy else tile(64, 32, 64, D)
    return tile(64, 16, 64, D, num_warps=8 if dropout and shared_memory < DATA_CENTRE_SHARED_MEMORY else 4)


@functools.cache
def key_gradient_tiles(
    dtype: torch.dtype, D: int, shared_memory: int, dropout: bool = False, atomics: bool = False, ragged: bool = False
) -> dict[str, Any]:
    """Tile of dk and dv. Both have D columns: above 64, 16 rows a warp; above 128 a warp has part of the columns instead.

    With atomics dq's sums take registers too, so tiles are smaller; so do the addresses of ragged rows or keys, no multiple
    of 64: what fits without them would spill (sm_90; the smaller tiles take 8 to 16 % more instructions).
    """
    if dtype == torch.float32:
        if D <= 64 and not atomics:
            return tile(32, 32, FLOAT_PART, D)
        if 64 < D <= 128 and dropout:
            return tile(16 if atomics else 32, 16, FLOAT_PART, D)
        return tile(16, 32, FLOAT_PART, D, num_warps=8 if D > 128 or (atomics and D > 64) else 4)
    if shared_memory >= WIDE_SHARED_MEMORY:
        if D > 128:
            return tile(16, 32 if atomics or dropout or ragged else 64, 128, D, num_warps=8)
        if D > 64 and dropout and ragged and not atomics:
            return tile(32, 128, part_of(D), D, num_warps=8)
        if D > 64:
            return tile(16 if atomics else 32, 64, part_of(D), D)  # 64 rows spill
        return tile(32 if dropout and (atomics or ragged) else 64, 64, part_of(D), D)
    roomy = shared_memory >= DATA_CENTRE_SHARED_MEMORY and not atomics
    if D <= 64:
        return tile(32, 64, 64, D) if dropout else tile(32 if roomy else 16, 128, 64, D)
    if D <= 128:
        if dropout:
            return tile(16, 64, 128, D)
        return tile(32 if roomy else 16, 128, part_of(D), D, num_warps=8, held=roomy)
    return tile(32 if atomics else 64, 16, 64, D)


def needs_int64(*strides: Strides) -> bool:
    """Whether an offset within a tile passes 2^31."""
    return any(MAX_BLOCK * each[2] >= 2**31 for each in strides)


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The least word that keeps, as a signed 32-bit integer, and the factor of what is kept."""
    threshold = math.floor(dropout_p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)


def unit_of(dtype: torch.dtype, strides: tuple[Strides, ...]) -> int:
    """Elements of 16 bytes if they divide every stride but the last ones, so that loads are as wide; else 1."""
    unit = 16 // dtype.itemsize
    return unit if all(stride % unit == 0 for each in strides for stride in each[:3]) else 1


def constants_of(
    tiles: dict[str, Any], shape: tuple[int, ...], S: int, unit: int, dropout_p: float, int64: bool, tf32: bool
) -> dict[str, Any]:
    """All that a kernel is compiled for, but the token strides."""
    T, D = shape[2:]
    return tiles | {
        "D": D,
        "UNIT": unit,
        "CHECK_T": T % tiles["BLOCK_M"] != 0,
        "CHECK_S": S % tiles["BLOCK_N"] != 0,
        "DROPOUT": dropout_p > 0.0,
        "INT64": int64,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


# A plan is all of a launch that does not depend on the tensors' contents. Made anew for every call it would cost several
# times the launch itself; looked up it costs a few microseconds.


@functools.lru_cache(maxsize=1024)
def forward_plan(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], S: int, strides: tuple[Strides, ...],
    scale: float, dropout_p: float,
    force_int64: bool, tf32: bool,
) -> Plan:  # fmt: skip
    """Of attention_forward_kernel; strides of q, k and v."""
    B, H, T, D = shape
    unit = unit_of(dtype, strides)
    tiles = forward_tiles(dtype, D, limits(device).shared_memory, dropout_p > 0.0)
    int64 = force_int64 or needs_int64(*strides, (0, 0, H * D, 1))
    # A scale of 0 would make NaN of the mask's -inf.
    numbers = (
        *(stride // unit for each in strides for stride in each[:2]), H, T, S, max(scale, 1e-30),
        *dropout_arguments(dropout_p),
        *(each[2] for each in strides), H * D,
    )  # fmt: skip
    grid = (B * H * -(-T // tiles["BLOCK_M"]),)
    constants = constants_of(tiles, shape, S, unit, dropout_p, int64, tf32)
    return Plan(attention_forward_kernel, grid, device, numbers, constants)


@functools.lru_cache(maxsize=1024)
def backward_plans(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], S: int, strides: tuple[Strides, ...],
    scale: float, dropout_p: float,
    force_int64: bool, tf32: bool, atomics: bool,
) -> tuple[Plan, Plan]:  # fmt: skip
    """Of the kernel that leaves the rows' terms and of key_gradient_kernel; strides of dout, q, k, v, out, dq and dk."""
    B, H, T, D = shape
    unit, (memory, _, _, tensor_memory) = unit_of(dtype, strides), limits(device)
    int64 = force_int64 or needs_int64(*strides)
    scalars = (H, T, S, scale, *dropout_arguments(dropout_p))

    def strides_of(*which: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        flat = tuple(stride // unit for i in which for stride in strides[i][:2])
        return flat, tuple(strides[i][2] for i in which)

    row_tiles = query_gradient_tiles(dtype, D, memory, dropout_p > 0.0, tensor_memory)
    key_tiles = key_gradient_tiles(dtype, D, memory, dropout_p > 0.0, atomics, T % 64 > 0 or S % 64 > 0)
    row_constants = constants_of(row_tiles, shape, S, unit, dropout_p, int64, tf32)
    row_kernel = row_terms_kernel if atomics else query_gradient_kernel
    if atomics:
        flat, token = strides_of(0, 4)
        numbers = (*flat, H, T, scale, *token)
        row_constants = {
            "D": D,
            "WIDTHS": row_tiles["WIDTHS"],
            "BLOCK_M": 32,
            "UNIT": unit,
            "INT64": int64,
        }
    else:
        flat, token = strides_of(0, 1, 2, 3, 4, 5)
        numbers = (*flat, *scalars, *token)
    rows = Plan(row_kernel, (B * H * -(-T // row_constants["BLOCK_M"]),), device, numbers, row_constants)
    flat, token = strides_of(0, 1, 2, 3, 6)
    key_constants = constants_of(key_tiles, shape, S, unit, dropout_p, int64, tf32)
    # Beside held operands there is room for scores of 16 rows.
    key_constants |= {"ATOMICS": atomics, "ROWS": 16 if key_tiles["HELD"] else key_tiles["BLOCK_M"]}
    grid = (B * H * -(-S // key_tiles["BLOCK_N"]),)
    return rows, Plan(key_gradient_kernel, grid, device, (*flat, *scalars, *token), key_constants)


def allow_tf32(dtype: torch.dtype) -> bool:
    """Whether float32 products may be rounded to TF32: by PyTorch's own switch, off unless the user sets it."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def forward_into(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Strides,
    S: int,
    strides: tuple[Strides, ...],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Write the token-major `out`; returns stats. q is of this shape (B, H, T, D), by the strides, whatever its view says."""
    dtype = q.dtype
    B, H, T, _ = shape
    stats = q.new_empty(B, H, T, 2, dtype=torch.float32)
    plan = forward_plan(dtype, q.device, shape, S, strides, scale, dropout_p, FORCE_INT64, allow_tf32(dtype))
    plan.launch(q, k, v, out, stats, q if seed is None else seed)
    return stats


def backward_into(
    gradients: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    shape: Strides,
    S: int,
    strides: tuple[Strides, ...],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    atomics: bool,
) -> None:
    """Write dq, dk and dv, of which dk and dv have the same strides: those of dout, q, k, v, out, dq and dk."""
    dq, dk, dv = gradients
    dtype = q.dtype
    B, H, T, D = shape
    rows, keys = backward_plans(
        dtype, q.device, shape, S, strides, scale, dropout_p, FORCE_INT64, allow_tf32(dtype), atomics
    )  # fmt: skip
    terms = q.new_empty(B, H, 3 if dtype == torch.float32 else 2, T, dtype=torch.float32)
    seed = q if seed is None else seed
    if not atomics:
        rows.launch(dout, q, k, v, out, stats, terms, dq, seed)
        keys.launch(dout, q, k, v, terms, dq, dk, dv, seed)
        return
    dq_sum = q.new_zeros((B, H, T, D), dtype=torch.float32)
    rows.launch(dout, out, stats, terms)
    keys.launch(dout, q, k, v, terms, dq_sum, dk, dv, seed)
    dq.as_strided(shape, strides[5]).copy_(dq_sum.mul_(scale))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (token-major in memory) and stats (B, H, T, 2) fp32: each row's largest q k and its sum of exponentials."""
    if scale < 0.0:
        q, scale = -q, -scale  # the kernel's maximum is that of the products before the scale
    B, H, T, D = shape = q.shape
    out = q.new_empty(B, T, H, D)
    strides = q.stride(), k.stride(), v.stride()
    return out.transpose(1, 2), forward_into(out, q, k, v, shape, k.shape[2], strides, scale, dropout_p, seed)


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
    if scale < 0.0:  # as in the forward, whose stats these are
        dq, dk, dv = attention_backward(dout, -q, k, v, out, stats, -scale, dropout_p, seed, atomics)
        return dq.neg_(), dk, dv
    dq, dk, dv = q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape)
    strides = dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(), dk.stride()
    backward_into(
        (dq, dk, dv), dout, q, k, v, out, stats, q.shape, k.shape[2], strides, scale, dropout_p, seed, atomics
    )
    return dq, dk, dv


def of_heads(strides: Strides) -> Strides:
    """Strides (B, H, T, D) of (B, T, H, D): less time than a transposed view takes."""
    b, t, h, d = strides
    return b, h, t, d


def attention_packed_forward(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and stats, as attention_forward, of qkv (B, T, 3, H, D)."""
    if scale < 0.0:
        qkv, scale = negated_queries(qkv), -scale
    B, T, _, H, D = qkv.shape
    out = qkv.new_empty(B, T, H, D)
    q, k, v = qkv.unbind(2)
    strides = 3 * (of_heads(q.stride()),)
    return out, forward_into(out, q, k, v, (B, H, T, D), T, strides, scale, dropout_p, seed)


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
    if scale < 0.0:  # as in the forward, whose stats these are
        dqkv = attention_packed_backward(dout, negated_queries(qkv), out, stats, -scale, dropout_p, seed, atomics)
        dqkv.select(2, 0).neg_()
        return dqkv
    B, T, _, H, D = qkv.shape
    dqkv = qkv.new_empty(B, T, 3, H, D)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    packed, dpacked = of_heads(q.stride()), of_heads(dq.stride())
    strides = of_heads(dout.stride()), packed, packed, packed, of_heads(out.stride()), dpacked, dpacked
    backward_into((dq, dk, dv), dout, q, k, v, out, stats, (B, H, T, D), T, strides, scale, dropout_p, seed, atomics)
    return dqkv


def negated_queries(qkv: Tensor) -> Tensor:
    """A copy of qkv with -q."""
    q, k, v = qkv.unbind(2)
    return torch.stack((-q, k, v), 2)
