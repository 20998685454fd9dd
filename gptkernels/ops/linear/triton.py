"""GEMM in Triton, and the raw operators linear_forward and linear_backward on it.

C = A B, A (M, K), B (K, N), sums in fp32, with an epilogue on the sums while they are in registers. Every product of a
linear layer is this one with other strides:

    y = x W^T     both factors lie along K
    dx = dy W     B lies along N
    dW = dy^T x   A lies along M, B along N; M, N are the widths, K the rows

Tiling: a program owns a BLOCK_M x BLOCK_N tile of C in registers and walks K in steps of BLOCK_K; `num_stages` steps of
A and B wait in shared memory. Programs go through the tiles in groups of GROUP rows of tiles, so that the tiles that run
at the same time share their factors in L2.
Bytes: (M K N/BLOCK_N + K N M/BLOCK_M + M N) * element from L2, flops 2 M N K: bound by the tensor cores from about
K = 500 up. Deterministic: one program sums one tile, in order of K.

Loads: pointers (cp.async, 16 bytes) on sm_80 class devices; tensor descriptors (TMA, which also fills the tails) from
sm_90 on, where every row begins at a multiple of 16 bytes.
float32 means full precision on the FMA units; TF32 only with torch.backends.cuda.matmul.allow_tf32 = True.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.ops.linear.choice import choose
from gptkernels.ops.linear.triton_descriptors import accumulate_descriptors, blocks
from gptkernels.ops.linear.triton_tiles import plan, vector
from gptkernels.triton_launch import Plan, limits

# For tests on small inputs: offsets within a tile in 64 bits, and tensor descriptors where the device has none. The MLP's
# kernels, which stand on this file, follow them too.
FORCE_INT64 = False
FORCE_DESCRIPTORS = False

GROUP = tl.constexpr(8)
# Arguments whose values must not make new kernels: all that matters of them is in VECTOR and EVEN_K.
SIZES = ["M", "N", "K", "stride_a", "stride_b"]
PARTIAL_ROWS = 256  # rows summed by one program of column_sums: the partial sums are then 1/64 of the bytes or less


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column at which a program's tile begins: down GROUP tiles, then to the right, then the next group."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """n, told to be a multiple of VECTOR: by itself the compiler knows multiples of 16 only."""
    return n // VECTOR * VECTOR


@triton.jit
def offsets_along(start, size, stride, ALONG_K: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a factor's rows (or columns) within its tile; those beyond the matrix repeat its last ones.

    No mask is needed then: what is computed from the repeated ones is never stored. Where they lie next to each other
    whole vectors of them are repeated.
    """
    i = tl.arange(0, BLOCK)
    if ALONG_K:
        i = tl.minimum(i, size - 1 - start) * stride
    elif VECTOR == 1:
        i = tl.minimum(i, size - 1 - start)
    else:
        i = tl.minimum(i, size - VECTOR - start + i % VECTOR)
        i = tl.max_contiguous(tl.multiple_of(i, VECTOR), VECTOR)
    return i


@triton.jit
def accumulate_pointers(
    a_ptr,
    b_ptr,
    row,
    col,
    M,
    N,
    K,
    stride_a,
    stride_b,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of A B at (row, col); the base pointers walk along K in 64 bits, the offsets within a tile stay."""
    stride_a, stride_b, K = multiple(stride_a, VECTOR), multiple(stride_b, VECTOR), multiple(K, VECTOR)
    wide_a, wide_b = tl.cast(stride_a, tl.int64), tl.cast(stride_b, tl.int64)
    if INT64:
        stride_a, stride_b = wide_a, wide_b
    k = tl.arange(0, BLOCK_K)
    m = offsets_along(row, multiple(M, 1 if A_ALONG_K else VECTOR), stride_a, A_ALONG_K, VECTOR, BLOCK_M)
    n = offsets_along(col, multiple(N, 1 if B_ALONG_K else VECTOR), stride_b, B_ALONG_K, VECTOR, BLOCK_N)
    a_ptr += row * wide_a if A_ALONG_K else row
    b_ptr += col * wide_b if B_ALONG_K else col
    a_offsets = m[:, None] + (k if A_ALONG_K else k * stride_a)[None, :]
    b_offsets = (k if B_ALONG_K else k * stride_b)[:, None] + n[None, :]
    a_step = BLOCK_K if A_ALONG_K else BLOCK_K * wide_a
    b_step = BLOCK_K if B_ALONG_K else BLOCK_K * wide_b
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + a_offsets)
            b = tl.load(b_ptr + b_offsets)
        else:
            a = tl.load(a_ptr + a_offsets, mask=(k < K - k0)[None, :], other=0.0)
            b = tl.load(b_ptr + b_offsets, mask=(k < K - k0)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += a_step
        b_ptr += b_step
    return acc


@triton.jit
def accumulate(
    a,
    b,
    row,
    col,
    M,
    N,
    K,
    stride_a,
    stride_b,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of A B at (row, col) in fp32, by whichever way of loading the host chose."""
    if DESCRIPTORS:
        acc = accumulate_descriptors(a, b, row, col, K, A_ALONG_K, B_ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        acc = accumulate_pointers(
            a, b, row, col, M, N, K, stride_a, stride_b,
            A_ALONG_K, B_ALONG_K, VECTOR, EVEN_K, INT64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc


@triton.jit
def output_tile(
    row, col, M, N, VECTOR: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(offset of a contiguous (M, N) output's tile, offsets within it, mask)."""
    N = multiple(N, VECTOR)
    wide = tl.cast(N, tl.int64)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    within = i[:, None] * (wide if INT64 else N) + j[None, :]
    return row * wide + col, within, (i < M - row)[:, None] & (j < N - col)[None, :]


@triton.jit
def load_bias(bias_ptr, col, N, BLOCK_N: tl.constexpr):
    """A tile's piece of the bias in fp32."""
    j = col + tl.arange(0, BLOCK_N)
    return tl.load(bias_ptr + j, mask=j < N, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def gemm_kernel(
    a,
    b,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C = A B + bias (or None), rounded once into C's dtype."""
    row, col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    acc = accumulate(
        a, b, row, col, M, N, K, stride_a, stride_b,
        A_ALONG_K, B_ALONG_K, DESCRIPTORS, VECTOR, EVEN_K, INT64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, col, N, BLOCK_N)[None, :]
    start, within, mask = output_tile(row, col, M, N, VECTOR, INT64, BLOCK_M, BLOCK_N)
    tl.store(c_ptr + start + within, acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each", "N", "stride"])
def column_sums_kernel(
    x_ptr,
    sums_ptr,
    rows,
    each,
    N,
    stride,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of `each` rows of x (rows, N) to one row of `sums`: every BLOCK_M-th row in one fp32 sum, then those together."""
    N, stride = multiple(N, VECTOR), tl.cast(multiple(stride, VECTOR), tl.int64)
    i, j = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first, last, BLOCK_M):
        mask = (i < last - row)[:, None] & (j < N)[None, :]
        tile = tl.load(x_ptr + row * stride + i[:, None] * stride + j[None, :], mask=mask, other=0.0)
        acc += tile.to(tl.float32)
    sums = tl.sum(acc, axis=0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + tl.program_id(0) * tl.cast(N, tl.int64) + j, sums, mask=j < N)


def product_of(a: Tensor, b: Tensor, a_along_k: bool = True, b_along_k: bool = False) -> tuple[Any, ...]:
    """(M, N, K) and all else that the plan of a GEMM kernel on A and B, each with a contiguous last dimension, follows from.

    a is A (M, K) or, not along K, its transpose (K, M); b is B (K, N) or, along K, its transpose (N, K): a flag costs
    less time here than a transposed view.
    """
    (M, K), (K_b, N) = a.shape, b.shape
    if not a_along_k:
        M, K = K, M
    if b_along_k:
        N = K_b
    dtype, device = a.dtype, a.device
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    descriptors = (FORCE_DESCRIPTORS or limits(device).descriptors) and (a.data_ptr() | b.data_ptr()) % 16 == 0
    return (
        M, N, K, a.stride(0), b.stride(0), a_along_k, b_along_k, dtype, tf32, FORCE_INT64, descriptors, device,
    )  # fmt: skip


def gemm_plan(kernel: Any, product: tuple[Any, ...], **constants: Any) -> Plan:
    """Of a GEMM kernel, which has these constants beside the tile's."""
    grid, tile = plan(*product)
    sizes, device = product[:5], product[-1]
    return Plan(kernel, grid, device, sizes, constants | tile, blocks(tile) if tile["DESCRIPTORS"] else ())


@lru_cache(maxsize=4096)
def plain_plan(*product: Any) -> Plan:
    """Of gemm_kernel."""
    return gemm_plan(gemm_kernel, product)


def int64(reach: int) -> bool:
    """Whether offsets up to `reach` elements need 64 bits."""
    return FORCE_INT64 or reach >= 2**31


def column_sums(x: Tensor, out: Tensor) -> None:
    """out (N,) = the sums of x (rows, N): partial sums of PARTIAL_ROWS rows, then theirs."""
    rows, N = x.shape
    if rows > PARTIAL_ROWS:
        partial = x.new_empty((triton.cdiv(rows, PARTIAL_ROWS), N), dtype=torch.float32)
        launch_column_sums(x, partial, PARTIAL_ROWS)
        x, rows = partial, partial.shape[0]
    launch_column_sums(x, out, rows)


@lru_cache(maxsize=4096)
def column_sums_plan(rows: int, each: int, N: int, stride: int, itemsize: int, sums: int, device: torch.device) -> Plan:
    """Of column_sums_kernel, to so many rows of sums. One warp a program: no sum then crosses shared memory."""
    constants = {"VECTOR": vector(itemsize, N, stride), "BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 1}
    grid = (sums, triton.cdiv(N, 64))  # the second axis ends at 65535
    return Plan(column_sums_kernel, grid, device, (rows, each, N, stride), constants)


def launch_column_sums(x: Tensor, sums: Tensor, rows_each: int) -> None:
    """One row of `sums` from each `rows_each` rows of x; with none, one row of zeros."""
    rows, N = x.shape
    count = max(sums.numel() // max(N, 1), 1)
    column_sums_plan(rows, rows_each, N, x.stride(0), x.itemsize, count, x.device).launch(x, sums)


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    a_along_k: bool = True,
    b_along_k: bool = False,
    gemm: str | None = None,
) -> None:
    """out = A B + bias, factors as in product_of(), by `gemm` or what choose() says."""
    product = product_of(a, b, a_along_k, b_along_k)
    if gemm is None:
        gemm = choose("plain", *product[:3], a.dtype, a.device)
    if gemm == "cublas":
        cublas(a if a_along_k else a.t(), b.t() if b_along_k else b, bias, out)
    else:
        plain_plan(*product).launch(a, b, bias, out)


def cublas(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a b + bias by torch; cuBLAS has a bias in its epilogue too. Without one, out may be float32 beside 16-bit factors."""
    out = out.view(a.shape[0], b.shape[1])
    if bias is not None:
        torch.addmm(bias.to(a.dtype), a, b, out=out)
    elif out.dtype != a.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out=out)


def as_rows(t: Tensor) -> Tensor:
    """(..., C) as (N, C) with a contiguous last dimension; a view where t allows it."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def as_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as a factor: in the other's dtype, rounded in a pass of its own, which a large product hardly notices."""
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return weight if weight.stride(1) == 1 else weight.contiguous()


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    multiply(as_rows(x), as_weight(weight, x.dtype), y, bias, b_along_k=True)
    return y


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy W, dW = dy^T x, db = column sums of dy (empty without a bias)."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = weight.new_empty((weight.shape[0] if has_bias else 0,))
    dy, x = as_rows(dy), as_rows(x)
    multiply(dy, as_weight(weight, x.dtype), dx)
    multiply(dy, x, dweight, a_along_k=False)
    if has_bias:
        column_sums(dy, dbias)
    return dx, dweight, dbias
