"""Linear head and cross-entropy, chunk of rows by chunk of rows, on a GPU (Hsu et al. 2024, arXiv 2410.10989, section 3).

    logits = x W^T;   loss_n = logsumexp(logits_n) - logits_n[target_n]
    dlogits = scale (softmax(logits) - onehot(target));   dx = dlogits W;   dW = dlogits^T x

For a chunk of rows torch.mm makes the logits, in x's dtype, in one buffer; one kernel of the backend makes the rows' losses
and puts dlogits in the logits' place; two products make dx and add to dW, both in fp32. The logits of one chunk are all
that is held of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

# A chunk of this many logits, 2048 rows of GPT-2's vocabulary: 206 MB in bfloat16. Each chunk reads and writes the fp32
# sums of dW once, 0.3 GB there: an eighth of the time that the products of 2048 rows take on an A100 or H100, and half
# as many rows would double it; twice as many would double the memory, which is then more than the sums' own.
CHUNK_LOGITS = 2048 * 50304
# Rows of a chunk are whole tiles of cuBLAS.
TILE = 128
# cuBLAS's fast kernels want sizes in multiples of 16 bytes: with the 50257 words of GPT-2 its products took six times as
# long as with 50304 (H200, bfloat16). And Triton's loads are wide where it knows rows to be multiples of 16. Any other
# vocabulary is padded to a multiple of PADDED, with rows of zeros.
ALIGNED, PADDED = 16, 64


class Kernels(Protocol):
    """What a backend brings."""

    def count(self, targets: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The number of targets that count, and whether none is out of range (bool), both 0-d."""

    def rows(
        self,
        logits: Tensor,
        targets: Tensor,
        used: Tensor,
        ignore_index: int,
        mean: bool,
        vocab_size: int,
        gradient: bool,
    ) -> Tensor:
        """Losses of the rows; with `gradient` the logits become dlogits, 0 beyond vocab_size; divided by `used` if
        mean. logits is contiguous, its rows multiples of 16 bytes."""


def round_up(n: int, multiple: int) -> int:
    """The first multiple from n up."""
    return -(-n // multiple) * multiple


@lru_cache(maxsize=1024)
def rows_of_a_chunk(N: int, width: int, logits: int) -> int:
    """Rows of every chunk but the last, of N rows of `width` logits: much the same number in each.

    At most so many logits, or TILE rows if even those are more.
    """
    most = max(TILE, logits // width // TILE * TILE)
    chunks = max(1, -(-N // most))
    return min(N, round_up(-(-N // chunks), TILE))


def words(weight: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """The first vocab_size rows of weight in dtype, and rows of zeros up to a size that cuBLAS is fast with."""
    if vocab_size % ALIGNED == 0:
        return weight if vocab_size == len(weight) and weight.dtype == dtype else weight[:vocab_size].to(dtype)
    padded = weight.new_empty((round_up(vocab_size, PADDED), weight.shape[1]), dtype=dtype)
    padded[:vocab_size] = weight[:vocab_size]
    padded[vocab_size:] = 0
    return padded


def add_product(sums: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """sums = beta sums + a b; the factors may be 16-bit beside fp32 sums."""
    if a.dtype == sums.dtype:
        torch.addmm(sums, a, b, beta=beta, out=sums)
    elif a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, beta=beta, out=sums)
    else:  # The CPU, where kernels are interpreted or emulated, has no product that widens.
        torch.addmm(sums, a.to(sums.dtype), b.to(sums.dtype), beta=beta, out=sums)


def cross_entropy(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    vocab_size: int,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The loss and the number of targets that count, of words()'s weight; `out`, both fp32, become dx and dW but for
    float16's factor 1 / used; dW begins at 0."""
    used, fine = kernels.count(targets, ignore_index, vocab_size)
    message = f"targets must be in [0, {vocab_size}) or ignore_index {ignore_index}: check the tokens and vocab_size"
    torch._assert_async(fine, message)
    (N, _), width = x.shape, weight.shape[0]
    rows = rows_of_a_chunk(N, width, CHUNK_LOGITS)
    buffer, columns, whole = x.new_empty(rows, width), weight.t(), rows == N
    losses = []
    scaled = mean and x.dtype != torch.float16
    for begin in range(0, N, max(1, rows)):
        # All rows at once are no slice: each takes 2 us.
        chunk = slice(begin, begin + rows)
        x_rows, target_rows = (x, targets) if whole else (x[chunk], targets[chunk])
        logits = buffer if whole else buffer[: x_rows.shape[0]]
        torch.mm(x_rows, columns, out=logits)
        losses.append(kernels.rows(logits, target_rows, used, ignore_index, scaled, vocab_size, out is not None))
        if out is not None:
            dx, sums = out
            add_product(dx if whole else dx[chunk], logits, weight, beta=0)
            add_product(sums, logits.t(), x_rows)
    if len(losses) > 1:
        losses = [torch.cat(losses)]
    total = losses[0].sum() if losses else x.new_zeros((), dtype=torch.float32)
    return (total / used if mean else total), used


def forward(
    kernels: Kernels, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    """The loss.

    A target out of range raises RuntimeError on the CPU. On a GPU, which is not waited for, it is a device-side
    assertion, as PyTorch's own: the process's next synchronisation raises, and its CUDA context is lost.
    """
    used = words(weight, vocab_size, x.dtype)
    x, targets = x.contiguous(), targets.contiguous()  # which a raw operator called by hand may not have
    return cross_entropy(kernels, x, used, targets, ignore_index, mean, vocab_size, None)[0]


def gradients(
    kernels: Kernels, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dx and dweight in fp32; a target out of range as in the forward.

    float16's dlogits are kept without the factor 1 / used, which would push most of them below its smallest number.
    """
    used_words = words(weight, vocab_size, x.dtype)
    x, targets = x.contiguous(), targets.contiguous()
    dx = torch.empty_like(x, dtype=torch.float32)
    sums = weight.new_zeros((max(len(weight), len(used_words)), weight.shape[1]), dtype=torch.float32)
    out = dx, sums[: len(used_words)]
    loss, used = cross_entropy(kernels, x, used_words, targets, ignore_index, mean, vocab_size, out)
    dweight = sums[: len(weight)]
    if mean and x.dtype == torch.float16:
        factor = 1.0 / used.clamp(min=1)
        dx.mul_(factor)
        dweight.mul_(factor)
    return loss, dx, dweight
