"""The README's table: what the project must show, and what committed results say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.tables import NAMES, machine_line, refuse_quick

Results = Sequence[Mapping]
# Of the exact tiny Shakespeare after 2000 steps: nanoGPT's own code reaches 1.8857.
LOSS_TARGET, TIME_TARGET = 1.88, 0.55
COLUMNS = {"reference": "the reference", "ours fp32": "our fp32"} | NAMES
PEAKS = {"peak_mb": "peak memory", "peak_beyond_gradients_mb": "peak memory beyond the gradients"}


@dataclass(frozen=True)
class Goal:
    """One figure: in words, its value in a case or None where it was not measured, and whether less is better."""

    text: str
    value: Callable[[Mapping], float | None]
    limit: float
    unit: str
    at_most: bool = False

    def judged(self, case: Mapping | None) -> tuple[str, bool | None]:
        """The measured value in words, and whether it meets the goal; None where there is none."""
        value = None if case is None else self.value(case)
        if value is None:
            return f"{self.text}: not measured", None
        met = value <= self.limit if self.at_most else value >= self.limit
        return f"{value:.3g}{self.unit} {self.text}", met

    def wanted(self) -> str:
        """The goal in words."""
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}{self.unit} {self.text}"


def speedup(column: str, row: str, limit: float) -> Goal:
    """Ours against a column."""
    return Goal(COLUMNS[column], lambda case: case["speedup"].get(column, {}).get(row), limit, "x")


def matmul_roof(limit: float) -> Goal:
    """The share of the matmul roof that our training step reaches."""
    return Goal(
        "of the matmul roof",
        lambda case: case["columns"]["ours"].get("step", {}).get("matmul_roof_percent"),
        limit,
        " %",
    )


def of_bare_gemms(limit: float) -> Goal:
    """The speed of ours as a share of what its bare matrix products reach."""

    def percent(case: Mapping) -> float | None:
        ratio = case["speedup"].get("bare gemms", {}).get("both")
        return None if ratio is None else 100 * ratio

    return Goal("of the speed of its bare GEMMs", percent, limit, " %")


def memory(key: str, limit: float) -> Goal:
    """Our peak over best eager's; both are measured above weights and optimizer, or above the inputs."""

    def ratio(case: Mapping) -> float | None:
        ours, eager = (case["columns"][name].get("memory", {}).get(key) for name in ("ours", "eager"))
        return None if ours is None or not eager else ours / eager

    return Goal(f"best eager's {PEAKS[key]}", ratio, limit, "x", at_most=True)


@dataclass(frozen=True)
class Target:
    """A row of the table: the work, how to find its case, and its goals."""

    work: str
    match: Mapping[str, object]
    dtype: str
    goals: tuple[Goal, ...]

    def case(self, cases: Sequence[Mapping]) -> Mapping | None:
        """The last full measurement of this work."""
        found = [c for c in cases if c["dtype"] == self.dtype and all(c.get(k) == v for k, v in self.match.items())]
        return found[-1] if found else None


ATTENTION = (speedup("reference", "both", 2.0), speedup("eager", "both", 1.2))
TARGETS = (
    Target(
        "shakespeare-cpu training step, fp32",
        {"size": "shakespeare-cpu"},
        "fp32",
        (speedup("reference", "step", 1.8), speedup("eager", "step", 1.25), speedup("compile", "step", 1.35)),
    ),
    Target(
        "6 layers, 6 heads, width 384, T=256, B=8, V=65, training step, fp32",
        {"size": "gpt-384"},
        "fp32",
        (speedup("eager", "step", 1.25), speedup("compile", "step", 1.25), matmul_roof(85)),
    ),
    Target(
        "GPT-2 width (768, 12 heads, V=50257, 4 layers, B=2, T=256), training step, fp32",
        {"size": "gpt2-width"},
        "fp32",
        (
            speedup("reference", "step", 1.4),
            speedup("eager", "step", 1.4),
            speedup("compile", "step", 1.3),
            matmul_roof(75),
            memory("peak_mb", 0.5),
        ),
    ),
    Target(
        "the same, bf16",
        {"size": "gpt2-width"},
        "bf16",
        (speedup("ours fp32", "step", 1.7), speedup("eager", "step", 1.5), speedup("compile", "step", 1.5)),
    ),
    Target(
        "causal_attention fwd+bwd, B=8 H=6 T=256 D=64, fp32",
        {"op": "attention", "shape": {"B": 8, "H": 6, "T": 256, "D": 64}},
        "fp32",
        ATTENTION,
    ),
    Target(
        "causal_attention fwd+bwd, B=1 H=12 T=1024 D=64, fp32",
        {"op": "attention", "shape": {"B": 1, "H": 12, "T": 1024, "D": 64}},
        "fp32",
        ATTENTION,
    ),
    Target(
        "layer_norm with residual fwd+bwd, 2048x768, fp32",
        {"op": "layer_norm", "shape": {"N": 2048, "C": 768}},
        "fp32",
        (speedup("eager", "both", 1.5),),
    ),
    Target(
        "gelu_mlp fwd+bwd, 2048x768, fp32",
        {"op": "mlp", "shape": {"N": 2048, "C": 768, "F": 3072}},
        "fp32",
        (of_bare_gemms(85),),
    ),
    Target(
        "linear_cross_entropy fwd+bwd, 1024x768x50257, fp32",
        {"op": "cross_entropy", "shape": {"N": 1024, "C": 768, "V": 50257}},
        "fp32",
        (speedup("eager", "both", 1.5), memory("peak_beyond_gradients_mb", 1 / 8)),
    ),
)


def markdown(files: Results) -> str:
    """The table of all rows, and the machines that the figures are from."""
    # The goals are a CPU's, of whole cases.
    benches = [file for file in files if file.get("command") == "bench"]
    benches = [b for b in benches if b.get("device", "cpu") == "cpu" and b.get("what") != "scaling"]
    refuse_quick(benches)
    cases = [case for bench in benches for case in bench["cases"]]
    rows = [(t.work, *judged_row(t.goals, t.case(cases))) for t in TARGETS]
    rows += [training_row([f for f in files if "train_seconds" in f])]
    rows += [check_row(f) for f in files if f.get("command") == "check"]
    lines = ["| work | goal | measured | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    machines = dict.fromkeys(machine_line(bench["machine"]) for bench in benches)
    return "\n".join([*lines, "", *(f"{machine}\n" for machine in machines)]).rstrip()


def judged_row(goals: Sequence[Goal], case: Mapping | None) -> tuple[str, str, str]:
    """Goals, measured values and the verdict of one row; a case whose gate failed has no figures that count."""
    wanted = ", ".join(goal.wanted() for goal in goals)
    judged = [goal.judged(case) for goal in goals]
    verdicts = [met for _, met in judged]
    missed = [goal.text for goal, met in zip(goals, verdicts, strict=True) if met is False]
    if missed:
        verdict = f"not met: {', '.join(missed)}"
    elif None in verdicts:
        verdict = "not measured" if set(verdicts) == {None} else "met as far as measured"
    else:
        verdict = "met"
    return wanted, ", ".join(text for text, _ in judged), verdict


def training_row(runs: Results) -> tuple[str, str, str, str]:
    """The validation loss of the fast model's run, and its time beside the reference's."""
    # Other runs have no such loss.
    of = {run["config"]["train.model"]: run for run in runs if run["val_loss_random"] is not None}
    both = {"loss": of.get("fast", {}).get("val_loss_random"), "time": None}
    if len(of) == 2 and of["fast"]["step"] == of["reference"]["step"]:
        both["time"] = of["fast"]["train_seconds"] / of["reference"]["train_seconds"]
    goals = (
        Goal("validation loss measured nanoGPT's way", lambda run: run["loss"], LOSS_TARGET, "", at_most=True),
        Goal("the reference's time for the same steps", lambda run: run["time"], TIME_TARGET, "x", at_most=True),
    )
    data = f" ({of['fast']['data']})" if "fast" in of else ""
    return f"shakespeare-cpu training, 2000 steps{data}", *judged_row(goals, both)


def check_row(result: Mapping) -> tuple[str, str, str, str]:
    """What `gptkernels check` found."""
    rows = result["rows"]
    nearest = max(100 * row["error"] / row["allowed"] for row in rows if row["allowed"] and row["error"] is not None)
    failed = [row["quantity"] for row in rows if not row["passed"]]
    measured = f"{len(rows)} quantities, the worst at {nearest:.0f} % of its limit"
    wanted = "every error against float64 within 2x of the reference's own (gradients 3x)"
    verdict = f"not met: {', '.join(failed)}" if failed else "met"
    return f"fast against reference, {result['name']}, {result['dtype']}", wanted, measured, verdict
