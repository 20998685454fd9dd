"""How fast a model writes one token after another: plain PyTorch, ours with and without kept keys, and in 8 bits.

A column's text is not judged, since a rounding error may change a likeliest token: its logits after the prompt are, against
float64 as everywhere. Those of 8 bits are another function, and say by how much.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import in_turn, progress
from benchmarks.tables import aligned
from model.equivalence_rule import compare
from model.equivalence_subject import subject
from model.fast import FastGPT, Model
from model.generate import generate, logits_after
from model.quantise import with_nn_linear
from model.reference import GPT

# Columns that are another function than the model's.
EIGHT_BITS = {
    "weights in 8 bits": "Int8WeightOnlyConfig",
    "and activations": "Int8DynamicActivationInt8WeightConfig",
}
Column = tuple[Model, bool]  # and whether it keeps keys and values


def columns_of(weights: GPT, backend: str) -> dict[str, Column]:
    """Every column by name; those of torchao where it is installed."""
    fast = FastGPT.from_reference(weights, backend=backend).eval()
    found: dict[str, Column] = {"reference": (weights, False), "ours": (fast, True), "ours, keep=False": (fast, False)}
    try:
        import torchao.quantization as quantization
    except ImportError:
        return found
    for name, config in EIGHT_BITS.items():
        model = with_nn_linear(weights)
        quantization.quantize_(model, getattr(quantization, config)())
        found[name] = (model, False)
    return found


def seconds_of(column: Column, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """(for the first token, for each of the others): the first one passes the whole prompt through the model."""
    model, keep = column
    began = time.perf_counter()
    written = generate(model, prompt, tokens, temperature=0.0, keep=keep)
    next(written)
    first = time.perf_counter()
    for _ in written:
        pass
    return first - began, (time.perf_counter() - first) / (tokens - 1)


def bench_generate(name: str, prompt: int, tokens: int, rounds: int, backend: str) -> dict[str, Any]:
    """The figures of a preset or a run after a prompt of so many tokens, columns in turn, medians; in fp32 on a CPU."""
    what = subject(name, [], 0)
    context = what.config.model.context
    if not 1 <= prompt <= context - tokens or tokens < 2:
        raise ValueError(
            f"--prompt and --tokens must be at least 1 and 2, and fit into the context of {context}, got {prompt} and {tokens}"
        )
    weights = what.weights.eval()
    columns, text = columns_of(weights, backend), what.tokens[:prompt]
    with torch.no_grad():
        logits = {column: logits_after(*columns[column])(text).double() for column in columns}
        exact = logits_after(copy.deepcopy(weights).double(), False)(text)
    notes: dict[str, dict[str, Any]] = {}
    for column, found in logits.items():
        row = compare(column, found.float(), logits["reference"].float(), exact, dtype=torch.float32)
        judged = column not in EIGHT_BITS
        notes[column] = {
            "error": row.error,
            "largest": row.magnitude,
            "judged": judged,
            "passed": row.passed or not judged,
        }
    times: dict[str, list[tuple[float, float]]] = {column: [] for column in columns}
    for r in range(rounds + 1):  # the first one warms up
        progress(f"round {r}/{rounds}")
        for column in in_turn(list(columns), r):
            times[column].append(seconds_of(columns[column], text, tokens))
    progress("")
    for column, pairs in times.items():
        first, each = (statistics.median(values) for values in zip(*pairs[1:], strict=True))
        notes[column] |= {"first_token_ms": 1e3 * first, "tokens_per_s": 1 / each}
    return {
        "command": "bench",
        "what": "generate",
        "case": f"{name}, {prompt} tokens, then {tokens}, one at a time",
        "columns": notes,
        "passed": all(note["passed"] for note in notes.values()),
    }


def generate_text(result: Mapping[str, Any]) -> str:
    """The table."""
    rows = [("", "", "tokens/s", "first token, ms", "logits off by")]
    for column, note in result["columns"].items():
        off = f"{note['error']:.1e} of {note['largest']:.1f}"
        word = "" if note["passed"] else "WRONG"
        rows.append((column, word, f"{note['tokens_per_s']:.1f}", f"{note['first_token_ms']:.1f}", off))
    return "\n".join([result["case"], "", *aligned(rows)])
