"""Is this drift normal? The fast model's training losses beside those of plain PyTorch with its last bits shaken.

Two honest programs do not train along the same curve: each step rounds, and training makes the differences grow. How far
they may part is measured, not guessed: plain PyTorch trains K more times, each time from weights of which every number is
moved by one unit in the last place, up, down or not at all. That re-draws every rounding that follows, so these runs
stray from the float64 curve as any other program of the same function does.

The rule. With e_k(t) the distance of reference run k = 0 (not nudged) to K from float64 in step t, the spread up to t is

    s(t) = max over k and over t' <= t of e_k(t')

and the fast run must stay within +- (2 s(t) + eps max|loss|) of float64 in every step: the band.

Derivation. It is the error rule of model/equivalence_rule.py with the reference's error taken from K + 1 draws. If the
distances are normal and the fast run's is one more of them, the largest of 9 is 1.8 deviations on the average, and the
tenth lies beyond twice that in 0.6 % of cases (for K = 2 in 7 %); steps are no independent trials, since a drift stays.
The spread is the largest so far because drift grows, and a step in which all curves happen to cross would otherwise be no
band at all. eps max|loss| is the rounding of the loss itself, which in float32 is as large as the drift of some steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Config
from model.equivalence_levels import run_forward
from model.equivalence_rule import FACTOR, Row, compare, last_place
from model.equivalence_sites import Choice, as_it_is
from model.equivalence_subject import Batch, Models
from model.fast import Model
from model.optimize import make_optimizer
from model.reference import GPT

RUNS = 8


def training_losses(
    model: Model,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    config: Config,
    seed: int,
    choose: Choice = as_it_is,
) -> Tensor:
    """The loss before each of the steps, float64, with the preset's optimizer at its full learning rate.

    A copy is trained: the model keeps its weights.
    """
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, config)
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        _, loss = run_forward(model, batch, dtype, seed + i, choose)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip or math.inf)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@torch.no_grad()
def nudged(weights: GPT, dtype: torch.dtype, seed: int) -> GPT:
    """A copy with every weight moved by one unit in the last place of `dtype`, down, up or not at all."""
    moved, rng = copy.deepcopy(weights), torch.Generator().manual_seed(seed)
    for p in moved.parameters():
        p.add_((torch.randint(-1, 2, p.shape, generator=rng) * last_place(p.double(), dtype)).to(p.dtype))
    return moved


@dataclass(frozen=True)
class Band:
    """Losses of N training steps, (N,) float64 each: float64's, ours (twice), plain PyTorch's; (K, N) the nudged runs'."""

    exact: Tensor
    ours: Tensor
    again: Tensor
    plain: Tensor
    nudged: Tensor
    dtype: torch.dtype

    @property
    def references(self) -> Tensor:
        """(K + 1, N): how far each run of plain PyTorch lies from float64, with its sign."""
        return torch.cat((self.plain[None], self.nudged)) - self.exact

    @property
    def half_width(self) -> Tensor:
        """(N,): how far from float64 the fast run may be in each step."""
        spread = self.references.abs().amax(0).cummax(0).values
        return FACTOR * spread + torch.finfo(self.dtype).eps * self.exact.abs().max()

    @property
    def row(self) -> Row:
        """The verdict over all steps."""
        return compare(
            f"losses of {len(self.exact)} steps",
            self.ours,
            self.plain,
            self.exact,
            dtype=self.dtype,
            level="training",
            again=self.again,
            allowed=self.half_width,
        )

    def sentence(self) -> str:
        """Whether the drift is normal, and why."""
        off = (self.ours - self.exact).abs()
        runs = (
            f"{len(self.nudged) + 1} runs of plain PyTorch, {len(self.nudged)} of them from weights nudged by one ulp,"
        )
        if outside := torch.nonzero(~(off <= self.half_width)).flatten().tolist():
            step = outside[0]
            return (
                f"Is this drift normal? No: in step {step + 1} the fast model's loss is {off[step]:.1e} from float64's, "
                f"outside the band of +- {self.half_width[step]:.1e} that {runs} span."
            )
        return (
            f"Is this drift normal? Yes: over {len(off)} steps the fast model's loss strays from float64's by up to "
            f"{off.max():.1e}; {runs} stray by up to {self.references.abs().max():.1e}, and the fast run stays inside "
            f"their band (at most {100 * (off / self.half_width).max():.0f} % of its half width)."
        )

    def figures(self) -> dict[str, object]:
        """Every curve, for JSON; null stands for what is not finite."""

        def numbers(values: Tensor) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values.tolist()]

        curves = {name: numbers(getattr(self, name)) for name in ("exact", "ours", "plain", "half_width")}
        return {**curves, "nudged": [numbers(run) for run in self.nudged], "sentence": self.sentence()}


def measure_band(
    models: Models,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    config: Config,
    seed: int,
    runs: int = RUNS,
    say: Callable[[str], None] = lambda text: None,
) -> Band:
    """Train ours, plain PyTorch, float64 and the nudged references apart, on the same batches; say is told of each."""

    def losses(name: str, model: Model, choose: Choice = as_it_is) -> Tensor:
        say(f"training of {len(batches)} steps: {name}")
        return training_losses(model, batches, dtype, config, seed, choose)

    ours, again = (losses("ours", models.ours, models.choose) for _ in range(2))
    plain, exact = losses("plain PyTorch", models.plain), losses("float64", models.oracle)
    others = [
        losses(f"nudged weights, {run + 1} of {runs}", nudged(models.plain, dtype, seed + run)) for run in range(runs)
    ]
    return Band(exact, ours, again, plain, torch.stack(others), dtype)
