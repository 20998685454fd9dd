"""The libraries of the CUDA kernels: _cuda runs them on CUDA tensors, _simt runs the same source on CPU tensors.

_simt is csrc/simt: it executes a kernel thread by thread and checks every access as it goes, some thousand times slower
than a GPU. It is for tests and study.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from gptkernels.library import LIBRARY, NAMES, SIMT

# The operators that are written in Python: kernels of the libraries with torch's products around them, or instead of them.
PYTHON = {
    "linear_forward": "gptkernels.ops.linear.cuda",
    "linear_backward": "gptkernels.ops.linear.cuda",
    "gelu_mlp_forward": "gptkernels.ops.mlp.cuda",
    "gelu_mlp_backward": "gptkernels.ops.mlp.cuda",
    "linear_cross_entropy_forward": "gptkernels.ops.cross_entropy.cuda",
    "linear_cross_entropy_gradients": "gptkernels.ops.cross_entropy.cuda",
}
FOLDER = Path(__file__).parent
# Asked at every product of float32: torch's setting may change, also between two runs of a compiled graph.
TF32_ALLOWED = ctypes.CFUNCTYPE(ctypes.c_bool)(lambda: torch.backends.cuda.matmul.allow_tf32)
REBUILD = "`gptkernels doctor` shows the compiler's messages"


def load(name: str, remedy: str) -> str | None:
    """Load a library of operators; None if that worked, else why not and the remedy."""
    path = FOLDER / f"{name}.so"
    if not path.exists():
        return f"{path.name} is not built: {remedy}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}: {remedy}"
    ctypes.CDLL(str(path)).gptkernels_tf32_source(TF32_ALLOWED)
    return None


def in_python(name: str) -> Callable:
    """An operator of PYTHON; its file is imported at the first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(PYTHON[name]), name)(*args)

    return run


def missing(backend: str, name: str) -> Callable:
    """An implementation that says that there is none."""

    def run(*_: Any) -> NoReturn:
        raise RuntimeError(f"backend={backend!r} has no {name} in this version: use backend='triton' or 'reference'")

    return run


def fill(backend: str, namespace: str, library: torch.library.Library, key: str) -> None:
    """Add the operators that are written in Python; those that a loaded library lacks raise a message of ours."""
    for name in NAMES:
        if name in PYTHON:
            library.impl(name, in_python(name), key)
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key):
            library.impl(name, missing(backend, name), key)


cuda_unavailable = load(
    "_cuda",
    "cuda kernels are compiled by `pip install -e .` with a CUDA build of torch and nvcc (CUDA_HOME); "
    f"{REBUILD}; use backend='triton' meanwhile",
)
simt_unavailable = load("_simt", f"simt is built by `pip install -e .` with a C++20 compiler; {REBUILD}; use 'cpu'")
if cuda_unavailable is None:
    fill("cuda", "gptkernels", LIBRARY, "CUDA")
    if not torch.cuda.is_available():
        cuda_unavailable = "cuda finds no GPU that torch can use: use backend='simt', 'cpu' or 'reference'"
if simt_unavailable is None:
    fill("simt", "gptkernels_simt", SIMT, "CPU")
