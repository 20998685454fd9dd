"""torch.compile as a column: the options in one place, and what to say where there is no compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

# What torch raises on the first call where the C++ compiler or Python's headers are missing.
UNAVAILABLE_ERRORS = (BackendCompilerFailed, InductorError)


def compiled(function: Callable) -> Callable:
    """The function compiled for static shapes; the first call compiles, and no figure counts it."""
    return torch.compile(function, dynamic=False)


def reason(error: BaseException) -> str:
    """The line of a long compiler error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
