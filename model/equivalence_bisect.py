"""`check --bisect`: the first step, layer and operator where the fast model and the reference part.

The reference is trained; before each step its weights are given to the fast model and to float64, and logits, loss and
gradients are compared. In the first step beyond the budget every operator call is compared alone, in the order of the
forward, and the first that errs is named. Then the suspicion is put to the test: the fast model with the reference's
operator in that one place, with each operator replaced wherever it is called, and with each layer replaced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gptkernels
from model.equivalence_levels import compare_outcomes, factor_of, outcome
from model.equivalence_operators import compare_operators, on_reference
from model.equivalence_report import used
from model.equivalence_rule import Row, compare
from model.equivalence_sites import OPERATORS, Choice, Operator, Site, as_it_is, forward_sites
from model.equivalence_subject import Batch, Models, Subject
from model.optimize import make_optimizer
from model.reference import GPT

HEADER = ("taken from the reference", "nearest to its limit", "error", "used", "")


@dataclass(frozen=True)
class Swap:
    """The fast model with some calls taken from the reference: what was swapped, and the row nearest to its limit."""

    what: str
    worst: Row


@dataclass(frozen=True)
class Bisection:
    """What parts first: the step (from 0), the operator call, and its row; None where nothing does."""

    steps: int
    step: int | None
    site: Site | None
    row: Row | None
    swaps: list[Swap]

    @property
    def parted(self) -> bool:
        """Whether anything was found."""
        return self.step is not None

    def cells(self) -> list[tuple[str, ...]]:
        """The swaps as words: with which of them the model is within its budget."""
        lines: list[tuple[str, ...]] = []
        for swap in self.swaps:
            worst = swap.worst
            verdict = "ok" if worst.passed else "FAILED"
            lines.append((swap.what, worst.quantity, f"{worst.error:.1e}", used(worst), verdict))
        return lines

    def sentence(self) -> str:
        """The finding in plain words."""
        if self.step is None:
            return (
                f"Bisect: in none of {self.steps} steps of the reference's own training does the fast model part from it "
                "beyond the budget."
            )
        if self.site is None or self.row is None:
            return (
                f"Bisect: the models part in step {self.step + 1}, but every operator call is within its budget alone: look "
                "between them (residuals, dropout, embeddings)."
            )
        alone = self.swaps[0].worst
        proof = "passes" if alone.passed else f"still fails ({alone.quantity}): there is another fault"
        why = "differs from run to run" if self.row.repeats is False else f"errs by {self.row.error:.1e}"
        return (
            f"Bisect: the models part in step {self.step + 1}, layer {self.site.layer}, operator {self.site.operator} at "
            f"{self.site.name}: {self.row.quantity.partition(': ')[2]} {why} where {self.row.allowed:.1e} is allowed. With "
            f"the reference's operator in that one place the model {proof}."
        )

    def figures(self) -> dict[str, object]:
        """For JSON."""
        site = None if self.site is None else {"name": self.site.name, "operator": self.site.operator}
        layer = None if self.site is None else self.site.layer
        swaps = [{"swapped": swap.what, "worst": swap.worst.figures()} for swap in self.swaps]
        row = None if self.row is None else self.row.figures()
        return {
            "step": self.step,
            "layer": layer,
            "site": site,
            "row": row,
            "swaps": swaps,
            "sentence": self.sentence(),
        }


def with_reference(choose: Choice, sites: Collection[Site]) -> Choice:
    """The choice with the reference's operator at some sites."""

    def chosen(site: Site, operator: Operator) -> Operator:
        return on_reference(getattr(gptkernels, site.operator)) if site in sites else choose(site, operator)

    return chosen


class Swaps:
    """Worst rows of the fast model under other choices; plain PyTorch and float64 are computed once."""

    def __init__(self, models: Models, batch: Batch, dtype: torch.dtype, seed: int) -> None:
        self.models, self.batch, self.dtype, self.seed = models, batch, dtype, seed
        self.plain, self.exact = (outcome(model, batch, dtype, seed) for model in (models.plain, models.oracle))

    def __call__(self, what: str, sites: Collection[Site]) -> Swap:
        choose = with_reference(self.models.choose, sites)
        first, again = (self.ours(choose) for _ in range(2))
        rows = [
            compare(
                name,
                first[name],
                self.plain[name],
                right,
                dtype=self.dtype,
                factor=factor_of(name),
                again=again[name],
            )
            for name, right in self.exact.items()
        ]
        return Swap(what, max(rows, key=lambda row: math.inf if row.repeats is False else row.share))

    def ours(self, choose: Choice) -> dict[str, Tensor]:
        """The fast model's outcome under a choice."""
        return outcome(self.models.ours, self.batch, self.dtype, self.seed, choose)


def training(what: Subject, batches: Sequence[Batch], dtype: torch.dtype, seed: int) -> Iterator[GPT]:
    """The reference before each of its training steps."""
    model = copy.deepcopy(what.weights).train()
    optimizer = make_optimizer(model, what.config)
    for i, batch in enumerate(batches):
        yield model
        outcome(model, batch, dtype, seed + i)
        torch.nn.utils.clip_grad_norm_(model.parameters(), what.config.train.clip or math.inf)
        optimizer.step()


def bisect(
    what: Subject,
    steps: int,
    *,
    backend: str,
    dtype: torch.dtype,
    seed: int,
    choose: Choice = as_it_is,
    every_swap: bool = True,
) -> Bisection:
    """The first of the steps, and in it the first operator call, where the fast model errs beyond the budget.

    Without every_swap only the call that was found is swapped.
    """
    batches = what.batches(max(steps, 1), seed)
    for step, reference in enumerate(training(what, batches, dtype, seed)):
        models = Models.of(reference, backend, choose)
        if parted := not all(row.passed for row in compare_outcomes(models, [batches[step]], dtype, seed + step)):
            break
    culprit = first_culprit(models, batches[step], dtype, seed + step) if parted else None
    site, row = culprit or (None, None)
    swap = Swaps(models, batches[step], dtype, seed + step)
    swaps = [swap(f"only {site}", {site})] if site else []
    if every_swap:
        everywhere = forward_sites(what.config.model)
        swaps.append(swap("nothing", set()))
        swaps += [swap(f"every {name}", {site for site in everywhere if site.operator == name}) for name in OPERATORS]
        layers = sorted({site.layer for site in everywhere})[:-1]
        swaps += [swap(f"layer {layer}", {site for site in everywhere if site.layer == layer}) for layer in layers]
    return Bisection(len(batches), step if parted else None, site, row, swaps)


def first_culprit(models: Models, batch: Batch, dtype: torch.dtype, seed: int) -> tuple[Site, Row] | None:
    """The first operator call of the forward that errs beyond its budget on the inputs it gets, with its worst result."""
    rows = compare_operators(models, [batch], dtype, seed)
    for site in dict.fromkeys(site for site, _ in rows):
        failed = [row for (of, _), row in rows.items() if of == site and not row.passed]
        if failed:
            return site, max(failed, key=lambda row: row.share)
    return None
