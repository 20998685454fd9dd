"""gelu_mlp in Triton: both GELU passes live in the epilogues of the products before them, on fp32 sums in registers.

Forward: the product x W_fc^T leaves h = (.) + b_fc (for the backward) and g = gelu(h); y = g W_proj^T + b_proj is plain.
Backward: the product dy W_proj leaves dh = (.) * gelu'(h), g again from the same exponential (so that g need not be kept
from the forward), and the sums of dh over the tile's rows, whose sums are db_fc; then dW_proj = dy^T g, dW_fc = dh^T x
and dx = dh W_fc are plain.
Or, where choose() says so, cuBLAS makes the products and one pass over memory does the rest: forward g from h (the bias
is in cuBLAS's epilogue), backward dh over the product, g and the sums of dh. Or cuBLASLt does (cublaslt.py), with these
epilogues of its own but for g in the backward, which stays a pass.

Bytes of a pass: forward 2 N F, backward 4 N F elements; an epilogue saves N F and 2 N F.
Tiling, loads, determinism: see ops/linear/triton.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.ops.linear.choice import choose
from gptkernels.ops.linear.triton import (
    SIZES,
    accumulate,
    as_rows,
    as_weight,
    column_sums,
    cublas,
    gemm_plan,
    int64,
    load_bias,
    multiple,
    multiply,
    output_tile,
    product_of,
    tile_of,
)
from gptkernels.ops.linear.triton_tiles import vector
from gptkernels.ops.mlp import cublaslt
from gptkernels.triton_launch import Plan

# The tile of a pass over memory without a product: 32 elements a thread (the float32 backward: 16, since 32 spill).
PASS_M, PASS_N = 16, 256
PASS_ROWS = 128  # rows of the backward pass that one program sums


@triton.jit
def probability_tanh(x, square):
    """(s, 1 - s), s = (1 + tanh u)/2 = 1/(1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3): without tanh's cancellation.

    1/y as rsqrt(y)^2: two instructions, where a division takes eight and is no more accurate.
    """
    e = tl.exp2(x * (-2.302208198 - 0.1029432396 * square))  # -2 log2(e) sqrt(2/pi) (1, 0.044715)
    r = tl.rsqrt(1.0 + e)
    s = r * r
    return s, tl.minimum(e, 1e38) * s  # where e is infinite s is 0, and so must the product be


@triton.jit
def probability_erf(x, square):
    """(P(normal <= x), e^(-x^2/2)), the first by e^(-x^2/2) erfcx(|x|/sqrt 2)/2 = P(normal <= -|x|).

    erfcx(|x|/sqrt 2) = t R(t), t = 1/(1 + 0.35 |x|/sqrt 2); R is a polynomial fitted to relative error 7e-9 for |x| up
    to 13, beyond which the factor before it is 0.
    """
    r = tl.rsqrt(1.0 + 0.247487373 * tl.abs(x))
    t = r * r
    w = 0.0378750207 * t - 0.155879176
    w = w * t + 0.173773002
    w = w * t - 0.0166566689
    w = w * t + 0.077063159
    w = w * t + 0.151863675
    w = w * t + 0.148981255
    w = w * t + 0.188423067
    w = w * t + 0.197068915
    w = w * t + 0.197487758
    e = tl.exp2(-0.7213475204 * square)  # log2(e)/2
    below = 0.5 * e * (w * t)
    return tl.where(x < 0, below, 1.0 - below), e


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """gelu(x) in fp32."""
    if TANH:
        s, _ = probability_tanh(x, x * x)
    else:
        s, _ = probability_erf(x, x * x)
    return x * s


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr):
    """gelu(x) and gelu'(x) in fp32, from one exponential."""
    square = x * x
    if TANH:
        s, rest = probability_tanh(x, square)
        slope = s + x * s * rest * (1.595769122 + 0.2140644488 * square)  # (x s)' = s + x s (1 - s) d2u/dx
    else:
        s, e = probability_erf(x, square)
        slope = s + x * e * 0.39894228  # 1/sqrt(2 pi)
    return x * s, slope


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=SIZES)
def gemm_gelu_kernel(
    a,
    b,
    bias_ptr,
    h_ptr,
    g_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    TANH: tl.constexpr,
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
    """h = A B + bias and g = gelu(h): GELU sees the fp32 sum, not h rounded."""
    row, col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    h = accumulate(
        a, b, row, col, M, N, K, stride_a, stride_b,
        A_ALONG_K, B_ALONG_K, DESCRIPTORS, VECTOR, EVEN_K, INT64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        h += load_bias(bias_ptr, col, N, BLOCK_N)[None, :]
    # A quarter of the columns at a time, else registers overflow (sm_90, where the sums are in them, and sm_100).
    left, right = halves(h, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        first, second = halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        at = col + half * (BLOCK_N // 2)
        finish_forward(first, h_ptr, g_ptr, row, at, M, N, TANH, VECTOR, INT64, BLOCK_M, BLOCK_N // 4)
        at += BLOCK_N // 4
        finish_forward(second, h_ptr, g_ptr, row, at, M, N, TANH, VECTOR, INT64, BLOCK_M, BLOCK_N // 4)


@triton.jit
def finish_forward(
    h,
    h_ptr,
    g_ptr,
    row,
    col,
    M,
    N,
    TANH: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of h and its GELU, stored."""
    start, within, mask = output_tile(row, col, M, N, VECTOR, INT64, BLOCK_M, BLOCK_N)
    tl.store(h_ptr + start + within, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(g_ptr + start + within, gelu(h, TANH).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gemm_gelu_backward_kernel(
    a,
    b,
    h_ptr,
    dh_ptr,
    g_ptr,
    sums_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    TANH: tl.constexpr,
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
    """dh = (A B) * gelu'(h), g = gelu(h), and the tile's column sums of dh to row `row/BLOCK_M` of sums (or None)."""
    row, col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    dg = accumulate(
        a, b, row, col, M, N, K, stride_a, stride_b,
        A_ALONG_K, B_ALONG_K, DESCRIPTORS, VECTOR, EVEN_K, INT64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # A quarter of the columns at a time: h and what is computed from it do not fit in registers beside the sums.
    left, right = halves(dg, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        first, second = halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        at = col + half * (BLOCK_N // 2)
        finish_backward(
            first, h_ptr, dh_ptr, g_ptr, sums_ptr, row, at, M, N, TANH, VECTOR, INT64, BLOCK_M, BLOCK_N // 4
        )
        at += BLOCK_N // 4
        finish_backward(
            second, h_ptr, dh_ptr, g_ptr, sums_ptr, row, at, M, N, TANH, VECTOR, INT64, BLOCK_M, BLOCK_N // 4
        )


@triton.jit
def finish_backward(
    dg,
    h_ptr,
    dh_ptr,
    g_ptr,
    sums_ptr,
    row,
    col,
    M,
    N,
    TANH: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """From a tile of the product: dh, g and the column sums of dh, stored."""
    start, within, mask = output_tile(row, col, M, N, VECTOR, INT64, BLOCK_M, BLOCK_N)
    h = tl.load(h_ptr + start + within, mask=mask, other=0.0).to(tl.float32)
    g, slope = gelu_and_slope(h, TANH)
    dh = dg * slope
    if sums_ptr is not None:
        counted = tl.where((tl.arange(0, BLOCK_M) < M - row)[:, None], dh, 0.0)  # rows beyond M repeat others
        store_sums(sums_ptr, tl.sum(counted, axis=0), row // BLOCK_M, col, N, BLOCK_N)
    tl.store(dh_ptr + start + within, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(g_ptr + start + within, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_sums(sums_ptr, sums, row, col, N, BLOCK_N: tl.constexpr):
    """A piece of a row of the partial sums."""
    j = col + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + row * tl.cast(N, tl.int64) + j, sums, mask=j < N)


@triton.jit(do_not_specialize=["size"])
def gelu_kernel(h_ptr, g_ptr, size, TANH: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """g = gelu(h), element by element."""
    size = multiple(size, VECTOR)
    start = tl.program_id(0) * tl.cast(BLOCK, tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < size - start
    h = tl.load(h_ptr + start + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + start + i, gelu(h, TANH).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N"])
def gelu_backward_kernel(
    dh_ptr, h_ptr, g_ptr, sums_ptr, M, N, TANH: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh *= gelu'(h) where the product lies, g = gelu(h), and the column sums of ROWS rows of dh (or None)."""
    first, col = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first, tl.minimum(first + ROWS, M), BLOCK_M):
        start, within, mask = output_tile(row, col, M, N, VECTOR, INT64, BLOCK_M, BLOCK_N)
        h = tl.load(h_ptr + start + within, mask=mask, other=0.0).to(tl.float32)
        dg = tl.load(dh_ptr + start + within, mask=mask, other=0.0).to(tl.float32)
        g, slope = gelu_and_slope(h, TANH)
        tl.store(g_ptr + start + within, g.to(g_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + start + within, (dg * slope).to(dh_ptr.dtype.element_ty), mask=mask)
        sums += dg * slope
    if sums_ptr is not None:
        store_sums(sums_ptr, tl.sum(sums, axis=0), tl.program_id(0), col, N, BLOCK_N)


def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """y, and h for the backward."""
    (F, C), dtype, device = w_fc.shape, x.dtype, x.device
    y, h = x.new_empty(*x.shape), x.new_empty(*x.shape[:-1], F)
    x = as_rows(x)
    g, w_fc = x.new_empty(x.shape[0], F), as_weight(w_fc, dtype)
    gelu_forward(x, w_fc, b_fc, h, g, tanh, choose("gelu", x.shape[0], F, C, dtype, device, tanh))
    multiply(g, as_weight(w_proj, dtype), y, b_proj, b_along_k=True)
    return y, h


@lru_cache(maxsize=4096)
def gemm_gelu_plan(tanh: bool, *product: Any) -> Plan:
    """Of gemm_gelu_kernel."""
    return gemm_plan(gemm_gelu_kernel, product, TANH=tanh)


@lru_cache(maxsize=4096)
def gelu_plan(size: int, tanh: bool, itemsize: int, device: torch.device) -> Plan:
    """Of gelu_kernel."""
    block = PASS_M * PASS_N
    constants = {"TANH": tanh, "VECTOR": vector(itemsize, size), "BLOCK": block}
    return Plan(gelu_kernel, (-(-size // block),), device, (size,), constants)


def gelu_forward(x: Tensor, w_fc: Tensor, b_fc: Tensor | None, h: Tensor, g: Tensor, tanh: bool, gemm: str) -> None:
    """h = x W_fc^T + b_fc and g = gelu(h), by the one kernel, by cuBLASLt or by cuBLAS and a pass."""
    if gemm == "triton":
        gemm_gelu_plan(tanh, *product_of(x, w_fc, b_along_k=True)).launch(x, w_fc, b_fc, h, g)
        return
    if gemm == "cublaslt":
        cublaslt.gelu(x, w_fc, b_fc, h, g)
        return
    cublas(x, w_fc.t(), b_fc, h)
    gelu_plan(h.numel(), tanh, h.itemsize, h.device).launch(h, g)


def gelu_mlp_backward(
    dy: Tensor, x: Tensor, h: Tensor, w_fc: Tensor, w_proj: Tensor, has_b_fc: bool, has_b_proj: bool, tanh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_fc, db_fc, dw_proj, db_proj (empty without that bias)."""
    F, C = w_fc.shape
    dx, dw_fc, dw_proj = x.new_empty(x.shape), w_fc.new_empty((F, C)), w_proj.new_empty((C, F))
    db_fc, db_proj = w_fc.new_empty((F if has_b_fc else 0,)), w_proj.new_empty((C if has_b_proj else 0,))
    dy, x = as_rows(dy), as_rows(x)
    h, w_proj = as_rows(h.contiguous()), as_weight(w_proj, x.dtype)
    gemm = choose("gelu_backward", *h.shape, C, h.dtype, h.device, tanh)
    dh, g, sums = gelu_backward(dy, h, w_proj, has_b_fc, tanh, gemm, w_fc.dtype)
    multiply(dy, g, dw_proj, a_along_k=False)
    multiply(dh, x, dw_fc, a_along_k=False)
    multiply(dh, as_weight(w_fc, x.dtype), dx)
    if sums is not None:
        column_sums(sums, db_fc)
    if has_b_proj:
        column_sums(dy, db_proj)
    return dx, dw_fc, db_fc, dw_proj, db_proj


@lru_cache(maxsize=4096)
def gemm_gelu_backward_plan(tanh: bool, *product: Any) -> Plan:
    """Of gemm_gelu_backward_kernel."""
    return gemm_plan(gemm_gelu_backward_kernel, product, TANH=tanh)


@lru_cache(maxsize=4096)
def gelu_backward_plan(M: int, F: int, tanh: bool, itemsize: int, wide: bool, device: torch.device) -> Plan:
    """Of gelu_backward_kernel."""
    constants = {
        "TANH": tanh, "VECTOR": vector(itemsize, F), "INT64": wide, "ROWS": PASS_ROWS, "BLOCK_M": PASS_M,
        "BLOCK_N": PASS_N, "num_warps": 2 * itemsize,
    }  # fmt: skip
    grid = (triton.cdiv(M, PASS_ROWS), triton.cdiv(F, PASS_N))  # a grid's second axis ends at 65535
    return Plan(gelu_backward_kernel, grid, device, (M, F), constants)


def gelu_backward(
    dy: Tensor, h: Tensor, w_proj: Tensor, has_bias: bool, tanh: bool, gemm: str, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh = (dy W_proj) * gelu'(h), g = gelu(h), and sums of dh over blocks of rows, if there is a bias to want them."""
    M, F = h.shape
    dh, g = torch.empty_like(h), torch.empty_like(h)
    if gemm == "triton":
        plan = gemm_gelu_backward_plan(tanh, *product_of(dy, w_proj))
        sums = partial_sums(h, plan.constants["BLOCK_M"], has_bias)
        plan.launch(dy, w_proj, h, dh, g, sums)
        return dh, g, sums
    if gemm == "cublaslt":
        # Its sums are in dh's dtype; wider ones are made of dh itself.
        sums = h.new_empty((1, F)) if has_bias and bias_dtype == h.dtype else None
        cublaslt.gelu_backward(dy, h, w_proj, dh, sums)
        gelu_plan(h.numel(), tanh, h.itemsize, h.device).launch(h, g)
        return dh, g, dh if has_bias and sums is None else sums
    torch.mm(dy, w_proj, out=dh)
    sums = partial_sums(h, PASS_ROWS, has_bias)
    gelu_backward_plan(M, F, tanh, h.itemsize, int64(F * PASS_M), h.device).launch(dh, h, g, sums)
    return dh, g, sums


def partial_sums(h: Tensor, rows_each: int, wanted: bool) -> Tensor | None:
    """Room for the sums over each `rows_each` rows, if wanted."""
    M, F = h.shape
    return h.new_empty((triton.cdiv(M, rows_each), F), dtype=torch.float32) if wanted else None
