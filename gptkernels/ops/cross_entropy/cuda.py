"""Linear head and cross-entropy, chunk of rows by chunk of rows (Hsu et al. 2024, arXiv 2410.10989, section 3), on CUDA.

For a chunk of rows torch.mm makes the logits, in x's dtype, in one buffer; one kernel (csrc/cross_entropy) makes the rows'
losses and puts dlogits in the logits' place; two products make dx and add to dW, in fp32. The logits of one chunk are all
that is held. The same code runs backend="simt" on CPU tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A chunk of this many logits, 2048 rows of GPT-2's vocabulary: 206 MB in bfloat16. Each chunk reads and writes the fp32
# sums of dW once, which takes an eighth of its products' time on an A100.
CHUNK_LOGITS = 2048 * 50304
# Rows of a chunk are whole tiles of cuBLAS, and rows of logits whole 32-byte sectors.
TILE, ALIGNMENT = 128, 16


def round_up(n: int, multiple: int) -> int:
    """The first multiple from n up."""
    return -(-n // multiple) * multiple


def add_product(sums: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """sums = beta sums + a b; the factors may be 16-bit beside fp32 sums."""
    if a.dtype == sums.dtype:
        torch.addmm(sums, a, b, beta=beta, out=sums)
    elif a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, beta=beta, out=sums)
    else:  # The CPU has no product that widens.
        torch.addmm(sums, a.to(sums.dtype), b.to(sums.dtype), beta=beta, out=sums)


def count_targets(targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """Number of targets that count, on their device; raises where one is out of range (see the forward below)."""
    counts = torch.ops.gptkernels_kernels.cross_entropy_count(targets, ignore_index, vocab_size)
    message = f"targets must be in [0, {vocab_size}) or ignore_index {ignore_index}: check the tokens and vocab_size"
    torch._assert_async(counts[1] == 0, message)
    return counts


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    vocab_size: int,
    dx: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss and the number of targets that count; with dx and sums (fp32), those become dx and dW but for
    float16's factor 1 / used."""
    N = x.shape[0]
    counts = count_targets(targets, ignore_index, vocab_size)
    losses = [x.new_zeros((1,), dtype=torch.float32)]
    weight = weight[:vocab_size].to(x.dtype)  # what pads it takes no part, whatever it holds
    chunks = max(1, -(-N * vocab_size // CHUNK_LOGITS))
    rows = min(N, round_up(-(-N // chunks), TILE))
    buffer = x.new_empty((rows, round_up(vocab_size, ALIGNMENT)))
    scaled = mean and x.dtype != torch.float16
    for begin in range(0, N, max(1, rows)):
        chunk = slice(begin, min(N, begin + rows))
        padded = buffer[: chunk.stop - begin]
        logits = padded[:, :vocab_size]
        torch.mm(x[chunk], weight.t(), out=logits)
        losses.append(
            torch.ops.gptkernels_kernels.cross_entropy_rows(
                padded, targets[chunk], counts, ignore_index, scaled, vocab_size, dx is not None
            )
        )
        if dx is not None and sums is not None:
            add_product(dx[chunk], logits, weight, beta=0)
            add_product(sums[:vocab_size], logits.t(), x[chunk])
    total = torch.cat(losses).sum()
    return (total / counts[0] if mean else total), counts[0]


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    """The loss.

    A target out of range raises RuntimeError on the CPU. On a GPU, which is not waited for, it is a device-side
    assertion, as PyTorch's own: the process's next synchronisation raises, and its CUDA context is lost.
    """
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    loss, _ = cross_entropy(x, weight, targets, ignore_index, mean, vocab_size, None, None)
    return loss


def linear_cross_entropy_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dx and dweight in fp32; a target out of range as in the forward.

    float16's dlogits are kept without the factor 1 / used, which would push most of them below its smallest number.
    """
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    dx = torch.empty_like(x, dtype=torch.float32)
    sums = torch.zeros_like(weight, dtype=torch.float32)
    loss, used = cross_entropy(x, weight, targets, ignore_index, mean, vocab_size, dx, sums)
    if mean and x.dtype == torch.float16:
        factor = 1.0 / used.clamp(min=1)
        dx.mul_(factor)
        sums.mul_(factor)
    return loss, dx, sums
