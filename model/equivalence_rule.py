"""The error rule: what an implementation may be wrong by, given what plain PyTorch is wrong by in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


def allowed_error(reference_error: float, oracle_magnitude: float, dtype: torch.dtype, factor: float = FACTOR) -> float:
    """The largest error that an implementation in `dtype` may have: factor*reference_error + eps*oracle_magnitude.

    reference_error = max|plain - oracle| and oracle_magnitude = max|oracle|, over the elements of one quantity.

    Derivation. Plain PyTorch and ours round the same real function, each some thousand times an element, with unit
    roundoff eps/2 and in different orders. The roundings are nearly independent, so either error is a sum of many
    small terms of either sign, and both have one distribution whose deviation grows with the root of the length of
    the sums. Over a tensor of n elements the largest of n such errors is about sqrt(2 ln n) deviations and varies by
    only 1/sqrt(2 ln n) of one: the ratio of two honest implementations lies near 1, and 2 leaves room for sums split
    into longer or shorter pieces. A wrong mask, scale, epsilon or a lost term errs by orders of magnitude more.

    The second term is for quantities on which plain PyTorch is exact by luck (one number, a row of zeros): rounding
    the right result to `dtype` is itself off by up to eps/2 of the element, and a sum of two such by eps. It is one
    unit in the last place of the largest element, and no more: an absolute tolerance would let small tensors pass.

    The rule with factor 2 and 3 is that of flash-attention's tests (Dao and others).
    """
    return factor * reference_error + torch.finfo(dtype).eps * oracle_magnitude


@dataclass(frozen=True)
class Row:
    """One quantity: the largest errors of ours and of plain PyTorch against float64, and what ours may be."""

    quantity: str
    error: float
    reference_error: float
    magnitude: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too, on whichever side it is."""
        return self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """Our error over plain PyTorch's; 0 where both are exact."""
        if self.reference_error == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.reference_error

    def figures(self) -> dict[str, object]:
        """For JSON, which knows neither NaN nor infinity: those become null."""
        numbers = {name: getattr(self, name) for name in ("error", "reference_error", "magnitude", "allowed", "ratio")}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"quantity": self.quantity, **finite, "passed": self.passed}


def compare(
    quantity: str, ours: Tensor, plain: Tensor, oracle: Tensor, *, dtype: torch.dtype, factor: float = FACTOR
) -> Row:
    """The row of one tensor in three versions: ours, plain PyTorch in the same dtype, and the float64 oracle."""
    if not ours.shape == plain.shape == oracle.shape:
        raise ValueError(f"{quantity}: shapes {tuple(ours.shape)}, {tuple(plain.shape)} and {tuple(oracle.shape)}")
    if oracle.numel() == 0:
        return Row(quantity, 0.0, 0.0, 0.0, 0.0)
    error = (ours.double() - oracle).abs().max().item()
    reference_error = (plain.double() - oracle).abs().max().item()
    magnitude = oracle.abs().max().item()
    return Row(quantity, error, reference_error, magnitude, allowed_error(reference_error, magnitude, dtype, factor))


def pooled(rows: Sequence[Row], dtype: torch.dtype) -> Row:
    """One quantity over several batches: the largest of each number, under the same rule."""
    error, reference_error, magnitude = (
        largest(getattr(row, name) for row in rows) for name in ("error", "reference_error", "magnitude")
    )
    allowed = allowed_error(reference_error, magnitude, dtype)
    return Row(rows[0].quantity, error, reference_error, magnitude, allowed)


def largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if there is one among them, which Python's max may pass over."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)
