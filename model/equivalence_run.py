"""All levels of `check`, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from model.equivalence_band import RUNS, Band, measure_band
from model.equivalence_levels import compare_outcomes, compare_step, compare_tokens
from model.equivalence_operators import compare_blocks, compare_operators
from model.equivalence_rule import Row
from model.equivalence_sites import Choice, as_it_is
from model.equivalence_subject import Models, Subject
from model.progress import Whereabouts

# Three batches, so that a quantity of one number (the loss) is not judged by the luck of one rounding.
BATCHES = 3
# Greedy text to compare, after a prompt of so many tokens.
TOKENS, PROMPT = 48, 8


@dataclass
class Result:
    """Every row of a comparison, and the training curves where there were steps."""

    rows: list[Row] = field(default_factory=list)
    band: Band | None = None

    @property
    def passed(self) -> bool:
        """Whether the fast model is the reference's function."""
        return all(row.passed for row in self.rows)


def compare_all(
    what: Subject,
    *,
    steps: int,
    backend: str,
    dtype: torch.dtype,
    seed: int,
    runs: int = RUNS,
    tokens: int = TOKENS,
    choose: Choice = as_it_is,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Every level, from the operators to the generated text; the training is left out where there are no steps.

    say is told what begins; by default, where more than ten seconds have passed, so are you.
    """
    say = say or Whereabouts()
    models = Models.of(what.weights, backend, choose)
    batches = what.batches(max(steps, BATCHES), seed)
    few = batches[:BATCHES]
    say("operators")
    result = Result(list(compare_operators(models, few, dtype, seed).values()))
    say("blocks")
    result.rows += compare_blocks(models, few, dtype, seed)
    say("logits, loss and gradients")
    result.rows += compare_outcomes(models, few, dtype, seed)
    say("one optimizer step")
    result.rows.append(compare_step(models, few[0], dtype, what.config, seed, result.rows))
    if steps:
        result.band = measure_band(models, batches[:steps], dtype, what.config, seed, runs, say)
        result.rows.append(result.band.row)
    say("greedy text")
    prompt = what.tokens[: min(PROMPT, what.config.model.context)]
    result.rows.append(compare_tokens(models, prompt, tokens, dtype, result.rows))
    return result
