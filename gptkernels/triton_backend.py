"""The operators of the namespace gptkernels_triton: each is a function of gptkernels/ops/<op>/triton.py.

Those files import Triton, so they are imported at the first call. On CUDA tensors the kernels run compiled; on CPU tensors
under Triton's interpreter, slowly, for tests and study.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from gptkernels.library import TRITON

OPERATORS = {
    "attention": (
        "attention_forward",
        "attention_backward",
        "attention_packed_forward",
        "attention_packed_backward",
    ),
    "cross_entropy": ("linear_cross_entropy_forward", "linear_cross_entropy_gradients"),
    "layer_norm": ("layer_norm_forward", "add_layer_norm_forward", "layer_norm_backward"),
    "linear": ("linear_forward", "linear_backward"),
    "mlp": ("gelu_mlp_forward", "gelu_mlp_backward"),
}


def unavailable() -> str | None:
    """None where Triton is installed, else the remedy. One that is installed but broken says so when it is first used."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` (torch's CUDA builds bring it)"
    return None


@functools.cache
def kernels_of(op: str) -> Any:
    """The file of the operator's kernels."""
    return importlib.import_module(f"gptkernels.ops.{op}.triton")


def compiled(op: str, name: str) -> Callable:
    """The operator on CUDA tensors."""

    def run(*args: Any) -> Any:
        return getattr(kernels_of(op), name)(*args)

    return run


def interpreted(op: str, name: str) -> Callable:
    """The operator on CPU tensors."""

    def run(*args: Any) -> Any:
        interpreter = importlib.import_module("gptkernels.interpreter")
        with interpreter.interpreted():
            return getattr(kernels_of(op), name)(*args)

    return run


for _op, _names in OPERATORS.items():
    for _name in _names:
        TRITON.impl(_name, compiled(_op, _name), "CUDA")
        TRITON.impl(_name, interpreted(_op, _name), "CPU")
