"""`check --sabotage`: does check catch what it is there to catch?

Known bugs (model/equivalence_faults.py) are planted one at a time, each in a single operator call of a small model: check
must fail, and --bisect must name the very call. The same model without a fault must pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.equivalence_bisect import bisect
from model.equivalence_faults import FAULTS
from model.equivalence_report import aligned
from model.equivalence_rule import LEVELS, Row
from model.equivalence_run import compare_all
from model.equivalence_sites import Choice, as_it_is
from model.equivalence_subject import subject

# As small as a model with a block after the faulty one can be.
PRESET, SIZE = "tiny", ("n_layer=2", "n_embd=32", "context=16", "batch=4")
NOTHING = "nothing"
STEPS, RUNS, TOKENS = 2, 2, 4
HEADER = ("planted", "where", "", "shows in", "for example", "error / allowed", "bisect says")


@dataclass(frozen=True)
class Trial:
    """One fault (none: the model as it is), the rows that failed, and whether bisect named its place."""

    fault: str
    place: str
    failed: list[Row]
    bisected: str

    @property
    def passed(self) -> bool:
        """Whether check and bisect said what is true."""
        return bool(self.failed) == bool(self.place) and self.bisected == (self.place or NOTHING)

    @property
    def verdict(self) -> str:
        """What became of it, in a word."""
        if not self.place:
            return "passes" if self.passed else "FALSE ALARM"
        return "ESCAPED" if not self.failed else "caught" if self.passed else "MISPLACED"

    @property
    def levels(self) -> list[str]:
        """Where it shows, from the operator to the text."""
        return [level for level in LEVELS if any(row.level == level for row in self.failed)]

    def cells(self) -> tuple[str, ...]:
        """The trial as words; its example is the worst row of the first level."""
        if not self.failed:
            return (self.fault, self.place, self.verdict, "", "", "", self.bisected)
        worst = max((row for row in self.failed if row.level == self.levels[0]), key=lambda row: row.share)
        size = "differs" if worst.repeats is False else "no number" if worst.share == math.inf else f"{worst.share:.2g}"
        return (self.fault, self.place, self.verdict, ", ".join(self.levels), worst.quantity, size, self.bisected)

    def figures(self) -> dict[str, object]:
        """For JSON."""
        names = {"fault": self.fault, "place": self.place, "levels": self.levels, "bisected": self.bisected}
        return {**names, "verdict": self.verdict, "failed": [row.figures() for row in self.failed]}


def trial(fault: str, place: str, choose: Choice, again: Choice, settings: tuple[str, ...], backend: str) -> Trial:
    """Check and bisect a model with one fault; `again` is the fault anew, for it may remember what it saw."""
    what, dtype = subject(PRESET, [*SIZE, *settings], seed=0), torch.float32
    result = compare_all(
        what, steps=STEPS, backend=backend, dtype=dtype, seed=0, runs=RUNS, tokens=TOKENS, choose=choose
    )
    found = bisect(what, STEPS, backend=backend, dtype=dtype, seed=0, choose=again, every_swap=False)
    named = NOTHING if found.step is None else "no operator" if found.site is None else found.site.name
    return Trial(fault, place, [row for row in result.rows if not row.passed], named)


def trials(backend: str) -> Iterator[Trial]:
    """The model as it is, then every fault."""
    yield trial(NOTHING, "", as_it_is, as_it_is, ("dropout=0.1",), backend)
    for fault in FAULTS:
        yield trial(fault.name, fault.site, fault.planted(), fault.planted(), fault.settings, backend)


def sabotage_table(done: list[Trial]) -> str:
    """A line for each fault: at which levels it shows, by how much, and what bisect says."""
    return aligned([HEADER, *(one.cells() for one in done)], words=len(HEADER))


def sabotage_sentence(done: list[Trial]) -> str:
    """The result in plain words."""
    wrong = [one.fault for one in done if not one.passed]
    if wrong:
        return f"FAILED: check does not tell right from wrong: {'; '.join(wrong)}."
    return (
        f"check passes the model as it is, fails each of the {len(done) - 1} planted bugs, and bisect names the operator "
        "call that each stands in."
    )
