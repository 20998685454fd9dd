"""The error rule: what an implementation may be wrong by, given what plain PyTorch is wrong by in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# A gradient is a product of recomputed factors where autograd has kept them, each rounded once more: one error more.
FACTOR, GRADIENT_FACTOR = 2.0, 3.0

# What is compared, in the order of the table: from the smallest part to the whole.
LEVELS = ("operator", "block", "logits", "loss", "gradient", "step", "training", "tokens")


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
    """One quantity: the largest errors of ours and of plain PyTorch against float64, and what ours may be.

    rms and reference_rms are the root mean squares of the same errors; ulp is the median distance of ours from float64,
    in units in the last place of each element (a median: where a sum cancels, its last place is worth nothing);
    repeats is whether a second run gave the same bits, None where there was none.
    """

    quantity: str
    error: float
    reference_error: float
    magnitude: float
    allowed: float
    level: str = ""
    rms: float = 0.0
    reference_rms: float = 0.0
    ulp: float = 0.0
    repeats: bool | None = None

    @property
    def passed(self) -> bool:
        """False for NaN too, on whichever side it is."""
        return self.error <= self.allowed and self.repeats is not False

    @property
    def ratio(self) -> float:
        """Our error over plain PyTorch's; 0 where both are exact."""
        if self.reference_error == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.reference_error

    @property
    def share(self) -> float:
        """How much of what is allowed the error takes: above 1 it is too much; infinite for NaN."""
        if not (math.isfinite(self.error) and math.isfinite(self.allowed)):
            return math.inf
        if self.allowed == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.allowed

    def figures(self) -> dict[str, object]:
        """For JSON, which knows neither NaN nor infinity: those become null."""
        names = ("error", "reference_error", "magnitude", "allowed", "ratio", "rms", "reference_rms", "ulp")
        numbers = {name: getattr(self, name) for name in names}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        words = {"level": self.level, "quantity": self.quantity}
        return {**words, **finite, "repeats": self.repeats, "passed": self.passed}


def compare(
    quantity: str,
    ours: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    dtype: torch.dtype,
    factor: float = FACTOR,
    level: str = "",
    again: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Row:
    """The row of one tensor in three versions: ours, plain PyTorch in the same dtype, and the float64 oracle.

    again is what ours gave a second time. allowed is the largest error of each element, where another rule than
    allowed_error's holds: the row then says how much the error may be if the element nearest to its limit sets it.
    """
    if not ours.shape == plain.shape == oracle.shape:
        raise ValueError(f"{quantity}: shapes {tuple(ours.shape)}, {tuple(plain.shape)} and {tuple(oracle.shape)}")
    if oracle.numel() == 0:
        return Row(quantity, 0.0, 0.0, 0.0, 0.0, level)
    off, plain_off = (ours.double() - oracle).abs(), (plain.double() - oracle).abs()
    error, reference_error, magnitude = off.max().item(), plain_off.max().item(), oracle.abs().max().item()
    if allowed is None:
        limit = allowed_error(reference_error, magnitude, dtype, factor)
    else:
        share = torch.where(off == 0, 0.0, off / allowed).max().item()
        limit = error / share if share else allowed.max().item()
    return Row(
        quantity,
        error,
        reference_error,
        magnitude,
        limit,
        level,
        rms=off.square().mean().sqrt().item(),
        reference_rms=plain_off.square().mean().sqrt().item(),
        ulp=(off / last_place(oracle, dtype)).median().item(),
        repeats=None if again is None else torch.equal(ours, again),
    )


def last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each element of x, in float64; below the normal ones, theirs."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=limits.tiny))  # x = m 2^exponent with m in [1/2, 1)
    return torch.ldexp(torch.full_like(x, limits.eps / 2), exponent)


def nearest(rows: Sequence[Row]) -> Row:
    """One quantity in several parts, each with limits of its own: the largest of each number, and of the share of the limit."""
    share, row = max(row.share for row in rows), largest_of(rows)
    if share == math.inf:
        return replace(row, allowed=math.nan)
    return replace(row, allowed=row.error / share if share else largest(row.allowed for row in rows))


def pooled(rows: Sequence[Row], dtype: torch.dtype, factor: float = FACTOR) -> Row:
    """One quantity over several batches: the largest of each number, under the same rule."""
    row = largest_of(rows)
    return replace(row, allowed=allowed_error(row.reference_error, row.magnitude, dtype, factor))


def largest_of(rows: Sequence[Row]) -> Row:
    """The first row with the largest of each number among them all, and whether every one repeats."""
    names = ("error", "reference_error", "magnitude", "rms", "reference_rms", "ulp")
    known = [row.repeats for row in rows if row.repeats is not None]
    most: dict[str, Any] = {name: largest(getattr(row, name) for row in rows) for name in names}
    return replace(rows[0], repeats=all(known) if known else None, **most)


def largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if there is one among them, which Python's max may pass over."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)
