"""The kernel of linear_cross_entropy in Triton: losses and gradients of rows of logits; chunks.py has the products.

The kernel: a program owns a row and reads it twice. The first pass keeps a running maximum and a running sum of
exponentials for each thread (Milakov and Gimelshein 2018, arXiv 1805.02867), rescaled once in UNROLL vectors, so that no
barrier is in the loop and one exponential is due for a logit; the second takes another one. The maximum is subtracted
before the exponent is scaled: folding both into one FMA saves two instructions of 16 that are not the bottleneck, and
loses digits of a float32 loss. Where only the loss is wanted the second pass is left out.
Bytes: V elements in and, with gradients, V in again (L2) and V out for each row. Two exponentials a logit keep the MUFU
unit, 16 a clock, as busy as the memory is; the products around it take 10 times as long.
Deterministic: one program a row, sums in fixed order, no atomics.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.ops.cross_entropy import chunks
from gptkernels.triton_launch import Plan

LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit, and finite: a thread that has seen none has the sum 0 x 2^0, not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def count_kernel(targets_ptr, used_ptr, fine_ptr, N, V, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """used = number of targets that count, fine = whether none is out of range; one program."""
    used = tl.zeros((BLOCK,), tl.int64)
    wrong = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + rows, mask=rows < N, other=IGNORE)
        counts = target != IGNORE
        used += counts.to(tl.int64)
        wrong += (counts & ((target < 0) | (target >= V))).to(tl.int64)
    tl.store(used_ptr, tl.sum(used, 0).to(tl.float32))
    tl.store(fine_ptr, tl.sum(wrong, 0) == 0)


@triton.jit
def load_logits(
    row_ptr, start, V, width, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr
):
    """UNROLL vectors of VECTOR logits for each thread in fp32, -inf beyond V."""
    vector = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)
    columns = start + vector + (tl.arange(0, THREADS) * VECTOR)[None, :, None] + tl.arange(0, VECTOR)[None, None, :]
    if MASKED:
        # The load's mask ends at the row's width, a multiple of the vector, so that it stays a vector.
        x = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        return tl.where(columns < V, x, -float("inf"))
    return tl.load(row_ptr + columns).to(tl.float32)


@triton.jit
def online_update(x, m, total):
    """Each thread's running maximum m and sum of exponentials after more logits."""
    m_new = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    p = tl.exp2((x - m_new[None, :, None]) * LOG2E)
    return m_new, total * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.sum(p, 2), 0)


@triton.jit
def store_gradient(
    row_ptr,
    start,
    m,
    factor,
    V,
    width,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """logits -> factor exp(logits - m), and 0 from V to the row's width."""
    x = load_logits(row_ptr, start, V, width, UNROLL, THREADS, VECTOR, MASKED)
    vector = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)
    columns = start + vector + (tl.arange(0, THREADS) * VECTOR)[None, :, None] + tl.arange(0, VECTOR)[None, None, :]
    p = (tl.exp2((x - m) * LOG2E) * factor).to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + columns, p, mask=columns < width)
    else:
        tl.store(row_ptr + columns, p)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    used_ptr,
    V,
    width,
    IGNORE: tl.constexpr,
    MEAN: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Loss of one row of logits; with GRADIENT the row becomes scale (softmax - onehot), 0 from V to width."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * width
    target = tl.load(targets_ptr + n)
    STEP: tl.constexpr = UNROLL * THREADS * VECTOR
    SMALL: tl.constexpr = THREADS * VECTOR
    whole = V // STEP * STEP
    if (target == IGNORE) | (target < 0) | (target >= V):
        tl.store(losses_ptr + n, 0.0)
        if GRADIENT:
            for start in range(0, width, SMALL):
                columns = start + tl.arange(0, SMALL)
                tl.store(row_ptr + columns, tl.zeros((SMALL,), row_ptr.dtype.element_ty), mask=columns < width)
    else:
        target_logit = tl.load(row_ptr + target).to(tl.float32)
        m = tl.full((THREADS,), LOWEST, tl.float32)
        total = tl.zeros((THREADS,), tl.float32)
        for start in range(0, whole, STEP):
            m, total = online_update(load_logits(row_ptr, start, V, width, UNROLL, THREADS, VECTOR, False), m, total)
        for start in range(whole, V, SMALL):
            m, total = online_update(load_logits(row_ptr, start, V, width, 1, THREADS, VECTOR, True), m, total)
        m_row = tl.max(m, 0)
        total_row = tl.sum(total * tl.exp2((m - m_row) * LOG2E), 0)
        tl.store(losses_ptr + n, m_row - target_logit + tl.log(total_row))
        if GRADIENT:
            scale = 1.0
            if MEAN:
                scale = 1.0 / tl.load(used_ptr)
            factor = scale / total_row
            for start in range(0, whole, STEP):
                store_gradient(row_ptr, start, m_row, factor, V, width, UNROLL, THREADS, VECTOR, False)
            for start in range(whole, width, SMALL):
                store_gradient(row_ptr, start, m_row, factor, V, width, 1, THREADS, VECTOR, True)
            p = tl.exp2((target_logit - m_row) * LOG2E) * factor
            tl.debug_barrier()  # the target's column was just written by one thread, and is written again by another
            tl.store(row_ptr + target, (p - scale).to(row_ptr.dtype.element_ty))


def tiles(itemsize: int) -> dict[str, int]:
    """Constexprs and warps for logits of itemsize bytes: 16-byte vectors, 32 logits in flight a thread."""
    return {"UNROLL": 2 * itemsize, "THREADS": 256, "VECTOR": 16 // itemsize, "num_warps": 8}


@lru_cache(maxsize=1024)
def count_plan(N: int, device: torch.device, ignore_index: int, vocab_size: int) -> Plan:
    """Of count_kernel."""
    return Plan(count_kernel, (1,), device, (N, vocab_size), {"IGNORE": ignore_index, "BLOCK": 2048, "num_warps": 8})


def count(targets: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """chunks.Kernels.count."""
    # A number that divides another of its own dtype takes half the time.
    used, fine = targets.new_empty((), dtype=torch.float32), targets.new_empty((), dtype=torch.bool)
    count_plan(targets.shape[0], targets.device, ignore_index, vocab_size).launch(targets, used, fine)
    return used, fine


@lru_cache(maxsize=1024)
def rows_plan(
    N: int, width: int, itemsize: int, device: torch.device, ignore_index: int, mean: bool, vocab_size: int,
    gradient: bool,
) -> Plan:  # fmt: skip
    """Of cross_entropy_kernel."""
    constants = {"IGNORE": ignore_index, "MEAN": mean, "GRADIENT": gradient, **tiles(itemsize)}
    return Plan(cross_entropy_kernel, (N,), device, (vocab_size, width), constants)


def rows(
    logits: Tensor, targets: Tensor, used: Tensor, ignore_index: int, mean: bool, vocab_size: int, gradient: bool
) -> Tensor:
    """chunks.Kernels.rows."""
    N, width = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    plan = rows_plan(N, width, logits.itemsize, logits.device, ignore_index, mean, vocab_size, gradient)
    plan.launch(logits, targets, losses, used)
    return losses


KERNELS = SimpleNamespace(count=count, rows=rows)


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    """The loss (chunks.forward)."""
    return chunks.forward(KERNELS, x, weight, targets, ignore_index, mean, vocab_size)


def linear_cross_entropy_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dx and dweight in fp32 (chunks.gradients)."""
    return chunks.gradients(KERNELS, x, weight, targets, ignore_index, mean, vocab_size)
