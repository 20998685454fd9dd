"""Causal attention forward in Triton, and the small parts that the backward shares with it."""

from __future__ import annotations

import triton
import triton.language as tl

# exp(x) = exp2(x * LOG2E): the GPU has exp2, and the factor disappears into the multiplication by the scale.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_of(ptr, stride_b, stride_h, unit: tl.constexpr, b, h):
    """Where head (b, h) starts. Strides come in units, so that the compiler sees what divides them."""
    return ptr + b.to(tl.int64) * stride_b * unit + h.to(tl.int64) * stride_h * unit


@triton.jit
def row_offsets(rows: tl.constexpr, stride, int64: tl.constexpr):
    """(rows, 1) offsets of a tile's rows from its first one."""
    i = tl.arange(0, rows)[:, None]
    return (i.to(tl.int64) if int64 else i) * stride


@triton.jit
def load_part(at, start: tl.constexpr, width: tl.constexpr, D: tl.constexpr):
    """Columns [start, start + width) of a tile, 0 beyond D."""
    d = start + tl.arange(0, width)[None, :]
    return tl.load(at + d, mask=d < D, other=0.0) if start + width > D else tl.load(at + d)


@triton.jit
def load_tile(
    ptr, first, stride: tl.constexpr, rows: tl.constexpr, limit, check: tl.constexpr, D: tl.constexpr,
    WIDTHS: tl.constexpr, int64: tl.constexpr,
):  # fmt: skip
    """Rows first.. of a head as a tuple of WIDTHS columns each; 0 beyond D and, where `check`, row limit - 1 from there on.

    A repeated row costs fewer registers than a mask; whoever checks makes sure that nothing comes of it.
    """
    i = tl.arange(0, rows)[:, None]
    if check:
        i = tl.minimum(i, limit - 1 - first)
    at = ptr + tl.cast(first, tl.int64) * stride + (i.to(tl.int64) if int64 else i) * stride
    parts = (load_part(at, 0, WIDTHS[0], D),)
    for i in tl.static_range(1, len(WIDTHS)):
        parts = parts + (load_part(at, i * WIDTHS[0], WIDTHS[i], D),)
    return parts


@triton.jit
def store_part(at, inside, check: tl.constexpr, start: tl.constexpr, D: tl.constexpr, part):
    d = start + tl.arange(0, part.shape[1])[None, :]
    part = part.to(at.dtype.element_ty)
    if start + part.shape[1] > D:
        tl.store(at + d, part, mask=inside & (d < D))
    elif check:
        tl.store(at + d, part, mask=inside)
    else:
        tl.store(at + d, part)


@triton.jit
def store_tile(ptr, first, stride, offsets, limit, check: tl.constexpr, D: tl.constexpr, tile):
    """The inverse of load_tile, rounding to the tensor's dtype."""
    at = ptr + tl.cast(first, tl.int64) * stride + offsets
    inside = (first + tl.arange(0, offsets.shape[0]) < limit)[:, None] if check else True
    for i in tl.static_range(len(tile)):
        store_part(at, inside, check, i * tile[0].shape[1], D, tile[i])


@triton.jit
def zeros(rows: tl.constexpr, WIDTHS: tl.constexpr):
    """A tile of zeros to accumulate in."""
    parts = (zeros_part(rows, WIDTHS[0]),)
    for i in tl.static_range(1, len(WIDTHS)):
        parts = parts + (zeros_part(rows, WIDTHS[i]),)
    return parts


@triton.jit
def zeros_part(rows: tl.constexpr, width: tl.constexpr):
    """One of its parts; Triton 3.6 takes a number out of a tuple as a size only when it is an argument."""
    return tl.zeros((rows, width), tl.float32)


@triton.jit
def scaled(tile, factor):
    """factor * tile."""
    parts = (tile[0] * factor,)
    for i in tl.static_range(1, len(tile)):
        parts = parts + (tile[i] * factor,)
    return parts


@triton.jit
def inner_product(sums, x, y, PRECISION: tl.constexpr):
    """sums + x y^T of two tiles, over all columns.

    float32's FMAs add one product after another: a sum of each part keeps those chains, and their error, short. It begins
    with a zero that the compiler does not know to be one, since it would turn the addition into one long chain again.
    """
    for i in tl.static_range(len(x)):
        if PRECISION == "ieee" and x[i].dtype == tl.float32:
            sums += tl.dot(x[i], tl.trans(y[i]), sums * 0.0, input_precision=PRECISION)
        else:
            sums = tl.dot(x[i], tl.trans(y[i]), sums, input_precision=PRECISION)
    return sums


@triton.jit
def held(tile):
    """The tile in registers, in the layout of a product's sums, which is that of a left operand."""
    rows: tl.constexpr = tile[0].shape[0]
    parts = ()
    for i in tl.static_range(len(tile)):
        a = tl.zeros((rows, 16), tile[0].dtype)
        b = tl.zeros((16, tile[i].shape[1]), tile[0].dtype)
        parts = parts + (tl.dot(a, b, tile[i].to(tl.float32)).to(tile[0].dtype),)
    return parts


@triton.jit
def add_product(acc, weights, x, PRECISION: tl.constexpr):
    """acc + weights x, part by part."""
    weights = weights.to(x[0].dtype)
    parts = (tl.dot(weights, x[0], acc[0], input_precision=PRECISION),)
    for i in tl.static_range(1, len(x)):
        parts = parts + (tl.dot(weights, x[i], acc[i], input_precision=PRECISION),)
    return parts


@triton.jit
def weights(scores, shift, log_sum, scale_log2, EXACT: tl.constexpr):
    """exp2(scale_log2 scores - shift), one FMA and one exp2; if EXACT, exp2(scale_log2 (scores - shift) - log_sum).

    Rounding a large scaled score costs digits that only a float32 weight has: there shift is a score, subtracted first.
    """
    return tl.exp2((scores - shift) * scale_log2 - log_sum if EXACT else scores * scale_log2 - shift)


@triton.jit
def dropout_keep(seed, threshold, b, h, row, rows: tl.constexpr, col, cols: tl.constexpr):
    """(rows, cols) bool, true where a weight is kept: Philox4x32-10 on the absolute place, four columns a counter.

    `row` counts on the keys' axis; `col` is a multiple of 4.
    """
    quad = (col // 4 + tl.arange(0, cols // 4))[None, :] + tl.zeros((rows, 1), tl.int32)
    r = (row + tl.arange(0, rows))[:, None] + tl.zeros_like(quad)
    w0, w1, w2, w3 = tl.philox(seed, quad, r, tl.zeros_like(quad) + h, tl.zeros_like(quad) + b)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (.., 2, 2): joining adds the fastest axis
    return tl.reshape(words >= threshold.to(tl.uint32, bitcast=True), (rows, cols))


@triton.jit
def lane_sums(p):
    """(rows, 8) sums of every eighth column: in the layout of mma.sync no lane needs another's, until after the loop."""
    return tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // 8, 8)), 1)


@triton.jit
def forward_keys(
    acc, row_max, row_sum, q, k_ptr, v_ptr, first, last, m, b, h, S, offset, scale_log2, seed, threshold,
    stride_kt: tl.constexpr, stride_vt: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, V_WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_S: tl.constexpr,
    DROPOUT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [first, last)."""
    BLOCK_M: tl.constexpr = q[0].shape[0]
    EXACT: tl.constexpr = q[0].dtype == tl.float32
    for n in range(first, last, BLOCK_N):
        k = load_tile(k_ptr, n, stride_kt, BLOCK_N, S, MASKED and CHECK_S, D, WIDTHS, INT64)
        scores = inner_product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), q, k, PRECISION)
        if MASKED:
            seen = (n + tl.arange(0, BLOCK_N))[None, :] <= (m + offset + tl.arange(0, BLOCK_M))[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # The mask can leave a row without any key: there the maximum is -inf, and -inf - -inf must not happen.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        shift = shift if EXACT else shift * scale_log2
        p = weights(scores, shift[:, None], 0.0, scale_log2, EXACT)
        alpha = weights(row_max, shift, 0.0, scale_log2, EXACT)
        row_sum = row_sum * alpha[:, None] + lane_sums(p)
        if DROPOUT:
            p = tl.where(dropout_keep(seed, threshold, b, h, m + offset, BLOCK_M, n, BLOCK_N), p, 0.0)
        # A key beyond S, of which the last one stands in the tile, has the weight 0 in every row that is stored.
        v = load_tile(v_ptr, n, stride_vt, BLOCK_N, S, MASKED and CHECK_S, D, V_WIDTHS, INT64)
        acc = add_product(scaled(acc, alpha[:, None]), p, v, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
    "H", "T", "S", "threshold",
])  # fmt: skip
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, seed_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    H, T, S, scale, threshold, keep_scale, stride_qt: tl.constexpr, stride_kt: tl.constexpr, stride_vt: tl.constexpr,
    stride_ot: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr, V_WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr,
    CHECK_T: tl.constexpr, CHECK_S: tl.constexpr, DROPOUT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention forward with online softmax (Dao 2023, arXiv 2307.08691).

    out = dropout(softmax(scale q k^T, causal)) v, and of each row its largest q k and its sum of exponentials.
    Tiling: a program owns BLOCK_M rows of a head, the last and longest first; q waits in shared memory, the accumulator of
    BLOCK_M x D is in registers, k and v stream past in tiles of BLOCK_N keys by cp.async. Tiles that the mask leaves
    whole run in a loop without it, tiles on the diagonal in a second one, tiles above it not at all.
    Cost: 2 B H T^2 D flops (half of 4 B H T S D); reads q once, k and v once for every BLOCK_M rows, from the L2 cache.
    Bound by the tensor cores; on sm_80 1.7 (D = 64) to 1.9 (D = 128) shared-memory cycles for the 2 that a product takes.
    Deterministic: one owner and one order for every sum.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h, offset = bh // H, bh % H, S - T
    scale_log2 = scale * LOG2E
    q_ptr = head_of(q_ptr, stride_qb, stride_qh, UNIT, b, h)
    k_ptr = head_of(k_ptr, stride_kb, stride_kh, UNIT, b, h)
    v_ptr = head_of(v_ptr, stride_vb, stride_vh, UNIT, b, h)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    q = load_tile(q_ptr, m, stride_qt, BLOCK_M, T, CHECK_T, D, WIDTHS, INT64)
    if HELD:
        q = held(q)
    acc = zeros(BLOCK_M, V_WIDTHS)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M, 8), tl.float32)
    # Keys before `free` are seen by every row of the block; none from `last` on is seen by any.
    free = tl.maximum(m + offset + 1, 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(m + BLOCK_M + offset, S)
    acc, row_max, row_sum = forward_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, 0, free, m, b, h, S, offset, scale_log2, seed, threshold,
        stride_kt, stride_vt, D, WIDTHS, V_WIDTHS, BLOCK_N, False, CHECK_S, DROPOUT, INT64, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = forward_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, free, last, m, b, h, S, offset, scale_log2, seed, threshold,
        stride_kt, stride_vt, D, WIDTHS, V_WIDTHS, BLOCK_N, True, CHECK_S, DROPOUT, INT64, PRECISION,
    )  # fmt: skip

    row_sum = tl.sum(row_sum, 1)
    empty = row_sum == 0.0
    out = scaled(acc, (keep_scale / tl.where(empty, 1.0, row_sum))[:, None])
    out_ptr += b.to(tl.int64) * T * stride_ot + h * D
    store_tile(out_ptr, m, stride_ot, row_offsets(BLOCK_M, stride_ot, INT64), T, CHECK_T, D, out)
    rows = m + tl.arange(0, BLOCK_M)
    stats = tl.join(tl.where(empty, 0.0, row_max), row_sum)
    at = stats_ptr + bh.to(tl.int64) * T * 2 + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    if CHECK_T:
        tl.store(at, stats, mask=(rows < T)[:, None])
    else:
        tl.store(at, stats)
