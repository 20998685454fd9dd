"""The operators of the namespace gptkernels_triton: each is a function of gptkernels/ops/<op>/triton.py.

Those files import Triton, so they are imported at the first call. On CUDA tensors the kernels run compiled; on CPU tensors
under Triton's interpreter, slowly, for tests and study.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gptkernels.library import TRITON

# What arguments are, where no subclass of Tensor is there.
PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.dtype, float, int, bool, type(None)))

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


# Found here once: on the way of every call a chain of attributes is time.
dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
transforms, tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
profiler, compiling = torch._C._autograd._profiler_enabled, torch.compiler.is_compiling


def watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a tracer, a transform, a mode, a profiler or a subclass of Tensor is there to see a call."""
    return (
        compiling()
        or dispatch_modes() > 0
        or function_modes() > 0
        or transforms()
        or tracing() is not None
        or profiler()
        or not PLAIN.issuperset(map(type, arguments))
    )


def direct(name: str, on_cuda: Callable, on_cpu: Callable) -> Callable:
    """The operator past PyTorch's dispatcher, which to a function in Python is a way of 8 us, unless the call is watched."""

    def run(*arguments: Any) -> Any:
        if watched(arguments):
            return getattr(torch.ops.gptkernels_triton, name)(*arguments)
        return on_cuda(*arguments) if arguments[0].is_cuda else on_cpu(*arguments)

    return run


# Like torch.ops.gptkernels_triton.
DIRECT = SimpleNamespace()
for _op, _names in OPERATORS.items():
    for _name in _names:
        _functions = compiled(_op, _name), interpreted(_op, _name)
        TRITON.impl(_name, _functions[0], "CUDA")
        TRITON.impl(_name, _functions[1], "CPU")
        setattr(DIRECT, _name, direct(_name, *_functions))
