"""torch.compile as a column: the options in one place, and what to say where there is no compiler."""

from __future__ import annotations

from collections.abc import Callable


def compiled(function: Callable, *, beside: bool = False) -> Callable:
    """The function compiled for static shapes, whatever was compiled before; the first call compiles.

    beside: what was compiled before is still in use.
    """
    import torch._dynamo  # seconds of imports that a run without this column can do without

    if not beside:
        torch._dynamo.reset()  # the limit of recompilations counts per function
    return torch.compile(function, dynamic=False)


def unavailable(error: Exception) -> bool:
    """Whether it is what torch raises on the first call where the C++ compiler or Python's headers are missing."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    return isinstance(error, (BackendCompilerFailed, InductorError))


def reason(error: Exception) -> str:
    """The line of a long compiler error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Triton's begins with a place, `at 1:0:`, shows the source and ends with what is wrong there.
    said = lines[:1] + (lines[1:][-1:] if lines[0].startswith("at ") else [])
    return " ".join(said)[:200]
