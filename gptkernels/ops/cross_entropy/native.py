"""forward() and gradients() of the raw operators, native or Triton's.

There is no backward(): logits are not held, and with the chunk's logits at hand the gradients cost two products, against
three when a backward has to make the logits again. So the forward that needs gradients makes them at once.
"""

from __future__ import annotations

from torch import Tensor

from gptkernels.backend import kernels


def forward(
    backend: str, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> Tensor:
    """The loss."""
    return kernels(backend).linear_cross_entropy_forward(
        x.contiguous(), weight.contiguous(), targets.contiguous(), ignore_index, mean, vocab_size
    )


def gradients(
    backend: str, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients dx and dweight, both in fp32."""
    return kernels(backend).linear_cross_entropy_gradients(
        x.contiguous(), weight.contiguous(), targets.contiguous(), ignore_index, mean, vocab_size
    )
