"""Causal attention backward in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from gptkernels.ops.attention.triton_forward import (
    LOG2E,
    add_product,
    dropout_keep,
    head_of,
    held,
    inner_product,
    load_tile,
    row_offsets,
    scaled,
    store_tile,
    weights,
    zeros,
)


@triton.jit
def row_products(x, y):
    """rowsum(x * y)."""
    sums = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        sums += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return sums


@triton.jit
def row_terms(dout, out, stats_ptr, bh, m, T, scale_log2, BLOCK_M: tl.constexpr, EXACT: tl.constexpr):
    """What weights() takes (without EXACT only lse, in units of log2), and delta = rowsum(dout * out), of rows m..

    All are 0 for rows without a key or beyond T.
    """
    rows = m + tl.arange(0, BLOCK_M)
    at = stats_ptr + bh.to(tl.int64) * T * 2 + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    row_max, row_sum = tl.split(tl.load(at, mask=(rows < T)[:, None], other=0.0))
    log_sum = tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))
    shift = row_max if EXACT else row_max * scale_log2 + log_sum
    return shift, log_sum, row_products(dout, out)


@triton.jit
def store_terms(terms_ptr, bh, m, T, shift, log_sum, delta, EXACT: tl.constexpr):
    """Leave the terms of rows m.. for the kernel that owns keys: rows of T numbers a head, log_sum only if EXACT."""
    rows = m + tl.arange(0, shift.shape[0])
    terms_ptr += bh.to(tl.int64) * T * (3 if EXACT else 2)
    tl.store(terms_ptr + rows, shift, mask=rows < T)
    tl.store(terms_ptr + T + rows, delta, mask=rows < T)
    if EXACT:
        tl.store(terms_ptr + 2 * T + rows, log_sum, mask=rows < T)


@triton.jit
def load_term(terms_ptr, rows, T, beyond: tl.constexpr, CHECK_T: tl.constexpr):
    """One of the terms, `beyond` from row T on."""
    if CHECK_T:
        return tl.load(terms_ptr + rows, mask=rows < T, other=beyond)
    return tl.load(terms_ptr + rows)


@triton.jit
def query_gradient_keys(
    dq, q, dout, shift, log_sum, delta, k_ptr, v_ptr, first, last, m, b, h, S, offset, scale_log2, seed, threshold,
    keep_scale, stride_kt: tl.constexpr, stride_vt: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CHECK_S: tl.constexpr,
    DROPOUT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += dS K over the keys [first, last)."""
    BLOCK_M: tl.constexpr = q[0].shape[0]
    EXACT: tl.constexpr = q[0].dtype == tl.float32
    # dp begun from -delta saves a subtraction, but not where dropout scales it first, nor in the wide tiles whose sums
    # wgmma and tcgen05 begin from zero at no cost.
    BEGUN: tl.constexpr = not DROPOUT and BLOCK_M * BLOCK_N <= 4096
    for n in range(first, last, BLOCK_N):
        k = load_tile(k_ptr, n, stride_kt, BLOCK_N, S, MASKED and CHECK_S, D, WIDTHS, INT64)
        v = load_tile(v_ptr, n, stride_vt, BLOCK_N, S, MASKED and CHECK_S, D, WIDTHS, INT64)
        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dp = inner_product(dp - delta[:, None] if BEGUN else dp, dout, v, PRECISION)
        scores = inner_product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), q, k, PRECISION)
        p = weights(scores, shift[:, None], log_sum[:, None], scale_log2, EXACT)
        if DROPOUT:
            keep = dropout_keep(seed, threshold, b, h, m + offset, BLOCK_M, n, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        if not BEGUN:
            dp -= delta[:, None]
        if MASKED:
            row = (m + offset + tl.arange(0, BLOCK_M))[:, None]
            p = tl.where((n + tl.arange(0, BLOCK_N))[None, :] <= row, p, 0.0)
        ds = p * dp
        dq = add_product(dq, ds, k, PRECISION)
    return dq


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
    "stride_ob", "stride_oh", "stride_gb", "stride_gh", "stride_dqb", "stride_dqh",
    "H", "T", "S", "threshold",
])  # fmt: skip
def query_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, terms_ptr, dq_ptr, seed_ptr,
    stride_gb, stride_gh, stride_qb, stride_qh, stride_kb, stride_kh,
    stride_vb, stride_vh, stride_ob, stride_oh, stride_dqb, stride_dqh,
    H, T, S, scale, threshold, keep_scale, stride_gt: tl.constexpr, stride_qt: tl.constexpr, stride_kt: tl.constexpr,
    stride_vt: tl.constexpr, stride_ot: tl.constexpr, stride_dqt: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HELD: tl.constexpr,
    UNIT: tl.constexpr,
    CHECK_T: tl.constexpr, CHECK_S: tl.constexpr, DROPOUT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention backward, first of two kernels: dq (Dao et al. 2022, arXiv 2205.14135, appendix B.4).

    P = exp2(scale log2(e) q k^T - lse) (in float32 as weights() has it);  delta = rowsum(dout * out);  dS = P * (dout v^T - delta);  dq = scale dS k
    Tiling: a program owns BLOCK_M rows; q and dout wait in shared memory, dq is in registers, k and v stream past. It also
    leaves the terms of its rows for the second kernel, which needs them for rows that it does not own.
    Cost: 3 products a tile, so 3 B H T^2 D flops; reads as the forward.
    Deterministic: the 7 products of both kernels, instead of 5 in one, buy sums with one owner and no fp32 copy of dq.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h, offset = bh // H, bh % H, S - T
    q_ptr = head_of(q_ptr, stride_qb, stride_qh, UNIT, b, h)
    k_ptr = head_of(k_ptr, stride_kb, stride_kh, UNIT, b, h)
    v_ptr = head_of(v_ptr, stride_vb, stride_vh, UNIT, b, h)
    out_ptr = head_of(out_ptr, stride_ob, stride_oh, UNIT, b, h)
    dout_ptr = head_of(dout_ptr, stride_gb, stride_gh, UNIT, b, h)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    out = load_tile(out_ptr, m, stride_ot, BLOCK_M, T, CHECK_T, D, WIDTHS, INT64)
    dout = load_tile(dout_ptr, m, stride_gt, BLOCK_M, T, CHECK_T, D, WIDTHS, INT64)
    EXACT: tl.constexpr = dout[0].dtype == tl.float32
    scale_log2 = scale * LOG2E
    shift, log_sum, delta = row_terms(dout, out, stats_ptr, bh, m, T, scale_log2, BLOCK_M, EXACT)
    store_terms(terms_ptr, bh, m, T, shift, log_sum, delta, EXACT)

    # A row that sees one key has a weight of 1 whatever its score: its gradient is 0, not a rounding error.
    alone = m + tl.arange(0, BLOCK_M) + offset == 0
    if EXACT:
        log_sum = tl.where(alone, float("inf"), log_sum)
    else:
        shift = tl.where(alone, float("inf"), shift)
    q = load_tile(q_ptr, m, stride_qt, BLOCK_M, T, CHECK_T, D, WIDTHS, INT64)
    if HELD:
        q, dout = held(q), held(dout)
    dq = zeros(BLOCK_M, WIDTHS)
    free = tl.maximum(m + offset + 1, 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(m + BLOCK_M + offset, S)
    dq = query_gradient_keys(
        dq, q, dout, shift, log_sum, delta, k_ptr, v_ptr, 0, free, m, b, h, S, offset, scale_log2, seed, threshold,
        keep_scale, stride_kt, stride_vt, D, WIDTHS, BLOCK_N, False, CHECK_S, DROPOUT, INT64, PRECISION,
    )  # fmt: skip
    # Rows are checked here and by the store, which also counts them from the head's first, whether or not that is needed:
    # so addresses are computed anew, where those of the loads above would be spilled meanwhile.
    dq = query_gradient_keys(
        dq, q, dout, shift, log_sum, delta, k_ptr, v_ptr, free, last, m, b, h, S, offset, scale_log2, seed, threshold,
        keep_scale, stride_kt, stride_vt, D, WIDTHS, BLOCK_N, True, True, DROPOUT, INT64, PRECISION,
    )  # fmt: skip
    dq_ptr = head_of(dq_ptr, stride_dqb, stride_dqh, UNIT, b, h)
    dq_at = (m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * stride_dqt
    store_tile(dq_ptr, 0, stride_dqt, dq_at, T - m, True, D, scaled(dq, scale))


@triton.jit
def key_gradient_rows(
    dk, dv, k, v, q_ptr, dout_ptr, terms_ptr, dq_ptr, m, n, b, h, T, offset, scale_log2, seed,
    threshold, keep_scale, stride_qt: tl.constexpr, stride_gt: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    ROWS: tl.constexpr, MASKED: tl.constexpr,
    CHECK_T: tl.constexpr, DROPOUT: tl.constexpr, ATOMICS: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += dS^T Q and dv += P^T dout over the queries [m, m + ROWS); with ATOMICS also dq += dS K."""
    BLOCK_N: tl.constexpr = k[0].shape[0]
    EXACT: tl.constexpr = k[0].dtype == tl.float32
    q = load_tile(q_ptr, m, stride_qt, ROWS, T, CHECK_T, D, WIDTHS, INT64)
    dout = load_tile(dout_ptr, m, stride_gt, ROWS, T, CHECK_T, D, WIDTHS, INT64)
    rows = m + tl.arange(0, ROWS)
    # Beyond T, where the last row stands in the tile, the last of the terms makes the weight 0.
    shift = load_term(terms_ptr, rows, T, 0.0 if EXACT else float("inf"), CHECK_T)
    log_sum = load_term(terms_ptr + 2 * T, rows, T, float("inf"), CHECK_T) if EXACT else shift
    scores = inner_product(tl.zeros((BLOCK_N, ROWS), tl.float32), k, q, PRECISION)
    p = weights(scores, shift[None, :], log_sum[None, :], scale_log2, EXACT)
    if MASKED:
        row = (m + offset + tl.arange(0, ROWS))[None, :]
        p = tl.where((n + tl.arange(0, BLOCK_N))[:, None] <= row, p, 0.0)
    dp = inner_product(tl.zeros((BLOCK_N, ROWS), tl.float32), v, dout, PRECISION)
    delta = load_term(terms_ptr + T, rows, T, 0.0, CHECK_T)
    if DROPOUT:
        keep = tl.trans(dropout_keep(seed, threshold, b, h, m + offset, ROWS, n, BLOCK_N))
        dv = add_product(dv, tl.where(keep, p, 0.0), dout, PRECISION)
        ds = p * (tl.where(keep, dp * keep_scale, 0.0) - delta[None, :])
    else:
        dv = add_product(dv, p, dout, PRECISION)
        ds = p * (dp - delta[None, :])
    if ATOMICS and MASKED:  # a row that sees one key has no gradient, not even a rounding error
        ds = tl.where((m + offset + tl.arange(0, ROWS))[None, :] > 0, ds, 0.0)
    ds = ds.to(q[0].dtype)
    dk = add_product(dk, ds, q, PRECISION)
    if ATOMICS:
        dq = add_product(zeros(ROWS, WIDTHS), tl.trans(ds), k, PRECISION)
        at = dq_ptr + (rows.to(tl.int64) * D)[:, None]
        inside = (rows < T)[:, None]
        for i in tl.static_range(len(WIDTHS)):
            d = i * WIDTHS[0] + tl.arange(0, WIDTHS[i])[None, :]
            tl.atomic_add(at + d, dq[i], mask=inside & (d < D), sem="relaxed")
    return dk, dv


@triton.jit
def key_gradient_queries(
    dk, dv, k, v, q_ptr, dout_ptr, terms_ptr, dq_ptr, first, last, n, b, h, T, offset, scale_log2, seed,
    threshold, keep_scale, stride_qt: tl.constexpr, stride_gt: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    CHECK_T: tl.constexpr, DROPOUT: tl.constexpr, ATOMICS: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv over the queries [first, last), ROWS at a time."""
    for m in range(first, last, BLOCK_M):
        for i in tl.static_range(BLOCK_M // ROWS):
            dk, dv = key_gradient_rows(
                dk, dv, k, v, q_ptr, dout_ptr, terms_ptr, dq_ptr, m + i * ROWS, n, b, h, T, offset, scale_log2, seed,
                threshold, keep_scale, stride_qt, stride_gt, D, WIDTHS, ROWS, MASKED, CHECK_T, DROPOUT, ATOMICS, INT64,
                PRECISION,
            )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
    "stride_gb", "stride_gh", "stride_dkb", "stride_dkh", "H", "T", "S", "threshold",
])  # fmt: skip
def key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, terms_ptr, dq_ptr, dk_ptr, dv_ptr, seed_ptr,
    stride_gb, stride_gh, stride_qb, stride_qh, stride_kb, stride_kh,
    stride_vb, stride_vh, stride_dkb, stride_dkh,
    H, T, S, scale, threshold, keep_scale, stride_gt: tl.constexpr, stride_qt: tl.constexpr, stride_kt: tl.constexpr,
    stride_vt: tl.constexpr, stride_dkt: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr,
    CHECK_T: tl.constexpr, CHECK_S: tl.constexpr, DROPOUT: tl.constexpr, ATOMICS: tl.constexpr, INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention backward, second of two kernels: dk and dv (Dao et al. 2022, arXiv 2205.14135, appendix B.4).

    dv = P^T dout;  dk = scale dS^T q, with P and dS as in query_gradient_kernel (with dropout, P in dv and dP are masked).
    Tiling: a program owns BLOCK_N keys; k and v wait in shared memory, dk and dv are in registers, q and dout stream past.
    Scores are computed transposed, keys down: then P^T and dS^T are left operands as they lie in the registers.
    Cost: 4 products a tile, so 4 B H T^2 D flops; with ATOMICS a fifth, whose dq is added up in memory in fp32.
    Deterministic without ATOMICS.
    """
    blocks = tl.cdiv(S, BLOCK_N)
    bh, n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    b, h, offset = bh // H, bh % H, S - T
    q_ptr = head_of(q_ptr, stride_qb, stride_qh, UNIT, b, h)
    k_ptr = head_of(k_ptr, stride_kb, stride_kh, UNIT, b, h)
    v_ptr = head_of(v_ptr, stride_vb, stride_vh, UNIT, b, h)
    dout_ptr = head_of(dout_ptr, stride_gb, stride_gh, UNIT, b, h)
    dk_ptr = head_of(dk_ptr, stride_dkb, stride_dkh, UNIT, b, h)
    dv_ptr = head_of(dv_ptr, stride_dkb, stride_dkh, UNIT, b, h)
    terms_ptr += bh.to(tl.int64) * T * (3 if k_ptr.dtype.element_ty == tl.float32 else 2)
    dq_ptr += bh.to(tl.int64) * T * D
    seed = tl.load(seed_ptr) if DROPOUT else 0

    k = load_tile(k_ptr, n, stride_kt, BLOCK_N, S, CHECK_S, D, WIDTHS, INT64)
    v = load_tile(v_ptr, n, stride_vt, BLOCK_N, S, CHECK_S, D, WIDTHS, INT64)
    if HELD:
        k, v = held(k), held(v)
    dk = zeros(BLOCK_N, WIDTHS)
    dv = zeros(BLOCK_N, WIDTHS)
    # No row before `first` sees any key of the block; every row from `free` on sees all of them.
    first = tl.maximum(n - offset, 0) // BLOCK_M * BLOCK_M
    free = tl.minimum(tl.cdiv(tl.maximum(n + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M, T)
    dk, dv = key_gradient_queries(
        dk, dv, k, v, q_ptr, dout_ptr, terms_ptr, dq_ptr, first, free, n, b, h, T, offset, scale * LOG2E, seed,
        threshold, keep_scale, stride_qt, stride_gt, D, WIDTHS, BLOCK_M, ROWS, True, CHECK_T, DROPOUT, ATOMICS, INT64,
        PRECISION,
    )  # fmt: skip
    dk, dv = key_gradient_queries(
        dk, dv, k, v, q_ptr, dout_ptr, terms_ptr, dq_ptr, free, T, n, b, h, T, offset, scale * LOG2E, seed,
        threshold, keep_scale, stride_qt, stride_gt, D, WIDTHS, BLOCK_M, ROWS, False, CHECK_T, DROPOUT, ATOMICS, INT64,
        PRECISION,
    )  # fmt: skip
    at = row_offsets(BLOCK_N, stride_dkt, INT64)
    store_tile(dk_ptr, n, stride_dkt, at, S, CHECK_S, D, scaled(dk, tl.where(S > 1, scale, 0.0)))
    store_tile(dv_ptr, n, stride_dkt, at, S, CHECK_S, D, scaled(dv, keep_scale))


@triton.jit(do_not_specialize=["stride_gb", "stride_gh", "stride_ob", "stride_oh", "H", "T"])
def row_terms_kernel(
    dout_ptr, out_ptr, stats_ptr, terms_ptr, stride_gb, stride_gh, stride_ob, stride_oh, H, T, scale,
    stride_gt: tl.constexpr, stride_ot: tl.constexpr,
    D: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The terms of a block of rows, for the one-pass form, in which no kernel owns rows before they are needed."""
    blocks = tl.cdiv(T, BLOCK_M)
    bh, m = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    out_ptr = head_of(out_ptr, stride_ob, stride_oh, UNIT, bh // H, bh % H)
    dout_ptr = head_of(dout_ptr, stride_gb, stride_gh, UNIT, bh // H, bh % H)
    out = load_tile(out_ptr, m, stride_ot, BLOCK_M, T, True, D, WIDTHS, INT64)
    dout = load_tile(dout_ptr, m, stride_gt, BLOCK_M, T, True, D, WIDTHS, INT64)
    EXACT: tl.constexpr = dout[0].dtype == tl.float32
    shift, log_sum, delta = row_terms(dout, out, stats_ptr, bh, m, T, scale * LOG2E, BLOCK_M, EXACT)
    store_terms(terms_ptr, bh, m, T, shift, log_sum, delta, EXACT)
