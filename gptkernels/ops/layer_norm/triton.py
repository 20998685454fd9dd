"""LayerNorm with an optional residual addition before it, in Triton (Ba, Kiros and Hinton 2016, arXiv 1607.06450).

    s = x + residual;   xhat = (s - mean) rstd;   y = xhat weight + bias
    ds = rstd (wdy - mean(wdy) - xhat mean(wdy xhat)) + dtotal,   wdy = dy weight
    dweight = sum over rows of dy xhat;   dbias = sum over rows of dy

Tiling: a row is cut into parts of BLOCK columns, one 16-byte vector of the narrowest tensor a lane, and a tail that is
the next power of two: 768 bfloat16 are 3 x 256, and nothing is padded. Parts are added lane by lane before lanes are
added, so a row costs one reduction a sum however many parts it has. A lane owns up to 32 columns in fp32 registers; one
warp owns a row of up to 1024 columns (no shared memory, no barrier), 16 (backward 8) one of 16384. Rows of one part or less
share a program: a lane then owns 16 numbers of several rows.
Bytes a row: x, residual in, y, total out, C elements each (backward: dy, dtotal, x in, dx out), weight and bias from L1:
memory binds, with about 14 instructions an element in the way (backward 22, and 4 in the second kernel at 256 rows).

dweight and dbias: each of up to PROGRAMS programs adds its rows, in order, in registers and writes one fp32 row; a second
kernel adds those in a fixed tree. No atomics or locks: the same bits every time on GPUs of as many processors.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.triton_launch import Plan, limits

MaybeTensor = Tensor | None

# Columns a warp owns: 32 or 26 a lane, at which a forward takes 76 registers and a backward, which also holds the fp32
# sums of dweight and dbias, 200. Beyond 8 warps of 26 the backward reads its rows twice and keeps the sums only. They stay
# 8 warps: 16 of 128 registers spill at 16384 columns.
FORWARD_COLUMNS, BACKWARD_COLUMNS, WIDEST_BACKWARD = 1024, 832, 8
KEPT_COLUMNS, RELOAD_LANES = WIDEST_BACKWARD * BACKWARD_COLUMNS, tl.constexpr(WIDEST_BACKWARD * 32)
# Backward warps a processor, all of which are resident (as many registers as they have allow 12). Timed on an H200 with
# 65536 rows of 768 in bfloat16: 290, 183, 160, 232 us with 4, 8, 12, 16. A program has at least 4 rows: its own fp32 rows
# do not dominate.
BACKWARD_WARPS = 12
ROWS_A_PROGRAM = 4
# The second kernel's tile: 32 columns are one 128-byte line. Few programs read all rows, so each has 32 KB of loads under
# way: with an eighth of that it took 27 us on an H200, for 10 MB.
SUM_ROWS, SUM_COLUMNS = 256, 32


@triton.jit
def load_part(ptr, i: tl.constexpr, rows, N, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Part i of the rows in fp32, 0 beyond the last row and column."""
    columns = tl.arange(0, BLOCK if (i + 1) * BLOCK <= C else TAIL)
    # The part's begin goes to the pointer, where it ends up as the instruction's immediate offset.
    pointers = ptr + i * BLOCK + rows[:, None] * C + columns[None, :]
    if rows.shape[0] > 1:
        part = tl.load(pointers, mask=(rows < N)[:, None] & (columns < C - i * BLOCK)[None, :], other=0.0)
    elif i * BLOCK + columns.shape[0] > C:
        part = tl.load(pointers, mask=(columns < C - i * BLOCK)[None, :], other=0.0)
    else:
        part = tl.load(pointers)
    return part.to(tl.float32)


@triton.jit
def load_row(ptr, rows, N, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """All parts of the rows."""
    parts = ()
    for i in tl.static_range((C + BLOCK - 1) // BLOCK):
        parts = parts + (load_part(ptr, i, rows, N, C, BLOCK, TAIL),)
    return parts


@triton.jit
def store_part(ptr, part, i: tl.constexpr, rows, N, C: tl.constexpr, BLOCK: tl.constexpr):
    """Store part i of the rows in the pointer's dtype."""
    columns = tl.arange(0, part.shape[1])
    pointers = ptr + i * BLOCK + rows[:, None] * C + columns[None, :]
    part = part.to(ptr.dtype.element_ty)
    if part.shape[0] > 1:
        tl.store(pointers, part, mask=(rows < N)[:, None] & (columns < C - i * BLOCK)[None, :])
    elif i * BLOCK + part.shape[1] > C:
        tl.store(pointers, part, mask=(columns < C - i * BLOCK)[None, :])
    else:
        tl.store(pointers, part)


@triton.jit
def row_sums(parts, C: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, 1) sums of rows: parts of one width are added before their lanes are."""
    acc = parts[0]
    for i in tl.static_range(1, C // BLOCK):
        acc += parts[i]
    sums = tl.sum(acc, 1)
    if C > BLOCK and C % BLOCK:
        tail = parts[C // BLOCK]
        sums = tl.sum(acc + tail, 1) if tail.shape[1] == BLOCK else sums + tl.sum(tail, 1)
    return sums[:, None]


@triton.jit
def centre(part, mean, i: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """part - mean, with 0 beyond the row, so that padding does not leak into the variance."""
    centred = part - mean
    if i * BLOCK + part.shape[1] > C:
        columns = tl.arange(0, part.shape[1])
        centred = tl.where((columns < C - i * BLOCK)[None, :], centred, 0.0)
    return centred


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, N, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y, total, mean and rstd of ROWS rows; a pointer that is None stands for no residual, weight or bias."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.zeros((1,), tl.int64)
    parts = load_row(x_ptr, rows, N, C, BLOCK, TAIL)
    if residual_ptr is not None:
        residual = load_row(residual_ptr, rows, N, C, BLOCK, TAIL)
        totals = ()
        for i in tl.static_range(len(parts)):
            # The row that is normalised is the one that is stored: rounded to the sum's dtype.
            total = (parts[i] + residual[i]).to(total_ptr.dtype.element_ty)
            store_part(total_ptr, total, i, rows, N, C, BLOCK)
            totals = totals + (total.to(tl.float32),)
        parts = totals
    # Divided: a product would be contracted with the subtraction below, and a constant row be off its own mean.
    sums = row_sums(parts, C, BLOCK)
    mean = tl.div_rn(sums, tl.full(sums.shape, C, tl.float32))
    centred = ()
    squares = ()
    for i in tl.static_range(len(parts)):
        part = centre(parts[i], mean, i, C, BLOCK)
        centred = centred + (part,)
        squares = squares + (part * part,)
    rstd = tl.rsqrt(row_sums(squares, C, BLOCK) * (1.0 / C) + eps)
    if weight_ptr is not None:
        weight = load_row(weight_ptr, first, 1, C, BLOCK, TAIL)
    if bias_ptr is not None:
        bias = load_row(bias_ptr, first, 1, C, BLOCK, TAIL)
    for i in tl.static_range(len(parts)):
        y = centred[i] * rstd
        if weight_ptr is not None:
            y = y * weight[i]
        if bias_ptr is not None:
            y = y + bias[i]
        store_part(y_ptr, y, i, rows, N, C, BLOCK)
    mask = (rows < N)[:, None]
    tl.store(mean_ptr + rows[:, None], mean, mask=mask)
    tl.store(rstd_ptr + rows[:, None], rstd, mask=mask)


@triton.jit
def zero_row(C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr):
    """The parts of ROWS rows of zeros."""
    parts = ()
    for i in tl.static_range((C + BLOCK - 1) // BLOCK):
        parts = parts + (tl.zeros((ROWS, BLOCK if (i + 1) * BLOCK <= C else TAIL), tl.float32),)
    return parts


@triton.jit
def add_product(acc, a, b, i: tl.constexpr):
    """acc with a b added to its part i."""
    parts = ()
    for j in tl.static_range(len(acc)):
        parts = parts + ((acc[j] + a * b) if j == i else acc[j],)
    return parts


@triton.jit
def sum_of_rows(acc):
    """(1, columns) sum of acc's rows; of a single row not by a reduction, which would leave it in another layout."""
    return tl.sum(acc, 0)[None, :] if acc.shape[0] > 1 else acc


@triton.jit
def load_gradient_part(
    dy_ptr, x_ptr, weight_ptr, mean, rstd, i: tl.constexpr, rows, N,
    C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dy, xhat and wdy of part i. Padding needs no mask: dy is 0 there, and so is every product with it."""
    xhat = (load_part(x_ptr, i, rows, N, C, BLOCK, TAIL) - mean) * rstd
    dy = load_part(dy_ptr, i, rows, N, C, BLOCK, TAIL)
    wdy = dy
    if weight_ptr is not None:
        wdy = dy * load_part(weight_ptr, i, tl.zeros((1,), tl.int64), 1, C, BLOCK, TAIL)
    return dy, xhat, wdy


@triton.jit
def sums_of_reloaded(
    dy_ptr, x_ptr, weight_ptr, mean, rstd, rows, N, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """(1, 1) sums of wdy and wdy xhat of a row that is not kept: a loop, so that few parts at a time are in registers.

    A lane adds its own columns of a part first, so that it keeps one number of each sum. Four parts of 16-bit numbers a
    step or two of fp32, 8 warps' worth of registers, are more bytes under way than 16 warps have with one.
    """
    unroll: tl.constexpr = BLOCK // (2 * RELOAD_LANES)
    lanes: tl.constexpr = (1, RELOAD_LANES, BLOCK // RELOAD_LANES)
    acc_a = tl.zeros((1, RELOAD_LANES), tl.float32)
    acc_b = tl.zeros((1, RELOAD_LANES), tl.float32)
    for start in tl.range(0, C // BLOCK * BLOCK, BLOCK, loop_unroll_factor=unroll, disable_licm=True):
        weight_part_ptr = weight_ptr + start if weight_ptr is not None else None
        _, xhat, wdy = load_gradient_part(
            dy_ptr + start, x_ptr + start, weight_part_ptr, mean, rstd, 0, rows, N, C, BLOCK, TAIL
        )
        acc_a += tl.sum(tl.reshape(wdy, lanes), 2)
        acc_b += tl.sum(tl.reshape(wdy * xhat, lanes), 2)
    a, b = tl.sum(acc_a, 1)[:, None], tl.sum(acc_b, 1)[:, None]
    if C % BLOCK:
        _, xhat, wdy = load_gradient_part(dy_ptr, x_ptr, weight_ptr, mean, rstd, C // BLOCK, rows, N, C, BLOCK, TAIL)
        a += tl.sum(wdy, 1)[:, None]
        b += tl.sum(wdy * xhat, 1)[:, None]
    return a, b


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, N,
    C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """dx of every PROGRAMS-th group of ROWS rows, and these rows' sums dweight and dbias as one fp32 row each.

    With RELOAD a row is read a second time (from L2) instead of being kept: beside the sums it does not fit.
    """
    program = tl.program_id(0)
    dweight = zero_row(C, BLOCK, TAIL, ROWS)
    dbias = zero_row(C, BLOCK, TAIL, ROWS)
    # Of wide rows nothing is hoisted out of the loop: pointers that are held all along would be spilled.
    for group in tl.range(program, tl.cdiv(N, ROWS), tl.num_programs(0), disable_licm=RELOAD):
        rows = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < N)[:, None]
        mean = tl.load(mean_ptr + rows[:, None], mask=mask, other=0.0)
        # A row of one number is its own mean, and has no gradient: not even the rounding errors of the terms below.
        rstd = tl.load(rstd_ptr + rows[:, None], mask=mask & (C > 1), other=0.0)
        kept = ()
        wdys = ()
        products = ()
        if RELOAD:
            a, b = sums_of_reloaded(dy_ptr, x_ptr, weight_ptr, mean, rstd, rows, N, C, BLOCK, TAIL)
        else:
            for i in tl.static_range((C + BLOCK - 1) // BLOCK):
                part = load_gradient_part(dy_ptr, x_ptr, weight_ptr, mean, rstd, i, rows, N, C, BLOCK, TAIL)
                kept = kept + (part,)
                wdys = wdys + (part[2],)
                products = products + (part[2] * part[1],)
            a, b = row_sums(wdys, C, BLOCK), row_sums(products, C, BLOCK)
        a, b = a * (1.0 / C), b * (1.0 / C)
        for i in tl.static_range((C + BLOCK - 1) // BLOCK):
            if RELOAD:
                dy, xhat, wdy = load_gradient_part(dy_ptr, x_ptr, weight_ptr, mean, rstd, i, rows, N, C, BLOCK, TAIL)
            else:
                dy, xhat, wdy = kept[i]
            dx = (wdy - a - xhat * b) * rstd
            if dtotal_ptr is not None:
                dx += load_part(dtotal_ptr, i, rows, N, C, BLOCK, TAIL)
            if dweight_ptr is not None:
                dweight = add_product(dweight, dy, xhat, i)
            if dbias_ptr is not None:
                dbias = add_product(dbias, dy, 1.0, i)
            store_part(dx_ptr, dx, i, rows, N, C, BLOCK)
    row = (program + tl.zeros((1,), tl.int32)).to(tl.int64)
    for i in tl.static_range(len(dbias)):
        if dweight_ptr is not None:
            store_part(dweight_ptr, sum_of_rows(dweight[i]), i, row, 0, C, BLOCK)
        if dbias_ptr is not None:
            store_part(dbias_ptr, sum_of_rows(dbias[i]), i, row, 0, C, BLOCK)


@triton.jit
def sum_rows(ptr, out_ptr, columns, PROGRAMS, C: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """out = sum of PROGRAMS fp32 rows: tile by tile from the top, then the tile's rows as a tree."""
    acc = tl.zeros((BLOCK_ROWS, columns.shape[0]), tl.float32)
    for start in range(0, PROGRAMS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < PROGRAMS)[:, None] & (columns < C)[None, :]
        acc += tl.load(ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=columns < C)


@triton.jit
def sum_kernel(
    dweight_ptr,
    dbias_ptr,
    dweight_out_ptr,
    dbias_out_ptr,
    PROGRAMS,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """BLOCK_COLUMNS columns of dweight and dbias from the programs' rows."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if dweight_ptr is not None:
        sum_rows(dweight_ptr, dweight_out_ptr, columns, PROGRAMS, C, BLOCK_ROWS)
    if dbias_ptr is not None:
        sum_rows(dbias_ptr, dbias_out_ptr, columns, PROGRAMS, C, BLOCK_ROWS)


@cache
def tiles(C: int, itemsize: int, backward: bool = False) -> dict[str, int]:
    """Constexprs and warps for rows of C elements, of which a lane takes 16 bytes at once where one has itemsize."""
    columns = BACKWARD_COLUMNS if backward else FORWARD_COLUMNS
    warps = min(WIDEST_BACKWARD if backward else 16, triton.next_power_of_2(triton.cdiv(C, columns)))
    block = warps * 32 * (16 // itemsize)
    rows = 1
    if block >= C:
        warps, block = 4, triton.next_power_of_2(C)
        rows = max(1, warps * 32 * 16 // block)
    tail = triton.next_power_of_2(C % block) if C % block else block
    tile = {"C": C, "BLOCK": block, "TAIL": tail, "ROWS": rows, "num_warps": warps}
    return {**tile, "RELOAD": C > KEPT_COLUMNS} if backward else tile


@lru_cache(maxsize=1024)
def forward_plan(N: int, C: int, dtypes: tuple[torch.dtype, ...], device: torch.device, eps: float) -> Plan:
    """Of forward_kernel; dtypes of x, y and the residual, if there is one."""
    tile = tiles(C, min(4, *(dtype.itemsize for dtype in dtypes)))
    return Plan(forward_kernel, (-(-N // tile["ROWS"]),), device, (N, eps), tile)


def forward(
    x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, dtype: torch.dtype,
    total: MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean and rstd; the sum goes to total, if there is one."""
    *rows, C = x.shape
    y = torch.empty_like(x, dtype=dtype)
    # Sizes one by one take half the time of a list.
    mean = x.new_empty(*rows, dtype=torch.float32) if rows else x.new_empty((), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    dtypes = (x.dtype, dtype) if residual is None else (x.dtype, dtype, residual.dtype)
    plan = forward_plan(mean.numel(), C, dtypes, x.device, eps)
    plan.launch(x, residual, weight, bias, y, total, mean, rstd)
    return y, mean, rstd


def layer_norm_forward(
    x: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in dtype, mean and rstd in fp32."""
    return forward(x.contiguous(), None, weight, bias, eps, dtype, None)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in dtype, the sum in the wider dtype of both, mean and rstd in fp32."""
    x, residual = x.contiguous(), residual.contiguous()
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, mean, rstd = forward(x, residual, weight, bias, eps, dtype, total)
    return y, total, mean, rstd


@lru_cache(maxsize=1024)
def backward_plans(N: int, C: int, itemsize: int, device: torch.device) -> tuple[int, Plan, Plan]:
    """How many programs there are, and the plans of backward_kernel and of sum_kernel."""
    tile = tiles(C, itemsize, backward=True)
    # A processor more or less than a GPU has changes the order of the sums: without one, an A100's number.
    processors = limits(device).processors if device.type == "cuda" else 108
    resident = processors * max(1, BACKWARD_WARPS // tile["num_warps"])
    programs = max(1, min(resident, -(-N // (ROWS_A_PROGRAM * tile["ROWS"]))))
    rows = min(SUM_ROWS, triton.next_power_of_2(programs))
    sum_tile = {"C": C, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": SUM_COLUMNS, "num_warps": 8}
    backward = Plan(backward_kernel, (programs,), device, (N,), tile)
    return programs, backward, Plan(sum_kernel, (-(-C // SUM_COLUMNS),), device, (programs,), sum_tile)


def layer_norm_backward(
    dy: Tensor, dtotal: MaybeTensor, x: Tensor, weight: MaybeTensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (dtotal, if any, included), dweight and dbias; x is the forward's sum, a missing gradient is empty."""
    dy, x = dy.contiguous(), x.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    C = x.shape[-1]
    like = x if weight is None else weight
    dx = torch.empty_like(x)
    dweight = like.new_empty((0 if weight is None else C,))
    dbias = like.new_empty((C if has_bias else 0,))
    which = max if C > KEPT_COLUMNS else min  # beside the sums no registers are left for more than 16 bytes of any
    programs, backward, add = backward_plans(mean.numel(), C, which(dy.itemsize, x.itemsize), x.device)
    sums = [x.new_empty((programs, C), dtype=torch.float32) if g.numel() else None for g in (dweight, dbias)]
    backward.launch(dy, dtotal, x, weight, mean, rstd, dx, *sums)
    if sums[0] is not None or sums[1] is not None:
        add.launch(*sums, dweight, dbias)
    return dx, dweight, dbias
