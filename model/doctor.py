"""`gptkernels doctor`: what this machine has, what was built, and which backend each operator gets, and why no other."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import gptkernels
from gptkernels.backend import (
    BACKENDS,
    ISAS,
    available_backends,
    bf16_products,
    cpu_library,
    resolve,
    supported_isas,
    torch_has_amx,
)
from gptkernels.ops.attention.api import choose
from model.machine import processor_name

BUILD_REPORT = Path(gptkernels.__file__).parent / "_build.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 64
# The libraries beside those of cpu kernels, and what it means that a build did not try one.
OTHERS = {
    "_cuda": "not tried: it needs a CUDA build of torch, and nvcc",
    "_simt": "not built",
    "_simt_report": "not built: it needs pybind11",
}
OPERATORS: dict[str, Callable[[str, Tensor], str]] = {
    "causal_attention": choose,  # it looks at the width of a head too
    **dict.fromkeys(("layer_norm", "linear", "gelu_mlp", "linear_cross_entropy"), resolve),
}


def print_report() -> None:
    """The whole report; every part of it copes with what is missing."""
    print("\n".join([*section("machine", machine()), *section("toolchains", toolchains()), *libraries(), *operators()]))


def section(title: str, rows: dict[str, str]) -> list[str]:
    """A heading and its rows."""
    return [title, *(f"  {name:<12} {text}" for name, text in rows.items()), ""]


def machine() -> dict[str, str]:
    """Python, torch and what computes."""
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build (no CUDA)"
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {build}",
        "cpu": f"{processor_name()}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads and "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": gpus(),
    }


def gpus() -> str:
    """The GPUs that this torch can use, or why there are none."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        return "not usable: nvidia-smi is here, but this torch is a CPU build: install a CUDA build of torch"
    return "none that this torch can use"


def toolchains() -> dict[str, str]:
    """What native and Triton kernels are built with."""
    compiler = os.environ.get("CXX") or ("c++" if shutil.which("c++") else "g++")
    return {
        "c++": version_of(compiler, 0, "needed to build the cpu kernels; install g++ or clang, or set CXX"),
        "nvcc": version_of("nvcc", -2, "needed only to build CUDA kernels"),
        "triton": triton_version(),
    }


def version_of(command: str, line: int, purpose: str) -> str:
    """A tool's place and a line of its --version, or that it is missing and what for it is needed."""
    path = shutil.which(command)
    if path is None:
        return f"{command} not found ({purpose})"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    lines = done.stdout.splitlines()
    return f"{path}: {lines[line] if len(lines) >= 2 else done.stdout.strip()}"


def triton_version() -> str:
    """Its version, or the text of the error with which its import fails."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # whatever an import can raise: the text is what is asked for
        return f"cannot be imported: {type(error).__name__}: {error} (`pip install triton`)"


def libraries() -> list[str]:
    """Every native library: built or why not; of those with cpu kernels, whether this CPU runs it and which is loaded."""
    report = read_build_report()
    loaded, explanation = cpu_library()
    rows = {}
    for isa in ISAS:
        use = "loaded" if isa == loaded else "this CPU runs it" if isa in supported_isas() else "not for this CPU"
        rows[isa] = f"{use}; {built(f'_cpu_{isa}', report, 'not built')}"
    rows["in use"] = explanation
    if loaded:
        amx = "AMX" if torch_has_amx() else "no AMX"
        rows["bf16"] = f"matrix products: {bf16_products()} (torch sees {amx} on this CPU)"
    if forced := os.environ.get("GPTKERNELS_CPU_ISA"):
        rows["forced"] = f"GPTKERNELS_CPU_ISA={forced}"
    for name, untried in OTHERS.items():
        rows[name] = built(name, report, untried)
    return section("native libraries", rows)


def built(name: str, report: dict[str, str], untried: str) -> str:
    """What the build of a library came to, with the compiler's messages below each other."""
    result = report.get(f"gptkernels.{name}")
    there = any(BUILD_REPORT.parent.glob(f"{name}.*so"))
    if there and result != "built":
        result = f"of an earlier build (in the last one: {result or 'left out'})"
    elif result == "built" and not there:
        result = f"built, but {name}.so is no longer there"
    return ("\n" + " " * 17).join((result or untried).splitlines())


def read_build_report() -> dict[str, str]:
    """What setup.py wrote about its build, empty where it has not run or the file is broken."""
    try:
        return dict(json.loads(BUILD_REPORT.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def operators() -> list[str]:
    """What auto takes for each operator and dtype, and why the other backends do not work."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = {dtype: torch.empty(0, HEAD_DIM, dtype=dtype, device=device) for dtype in DTYPES}
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [f"operators on {device.type}: what backend=auto takes", f"  {'':<21}" + "".join(f"{n:<11}" for n in names)]
    for operator, choice in OPERATORS.items():
        # auto says on stderr when it finds only the reference: here the table does.
        with contextlib.redirect_stderr(io.StringIO()):
            taken = [outcome(partial(choice, "auto", x)) for x in samples.values()]
        lines.append(f"  {operator:<21}" + "".join(f"{name:<11}" for name in taken))
    return [*lines, "", *section("backends", {name: explain(name, samples) for name in BACKENDS})[:-1]]


def explain(backend: str, samples: dict[torch.dtype, Tensor]) -> str:
    """Whether a backend works here, and for what it does not: the errors that asking for it would raise."""
    reason = available_backends()[backend]
    if reason is not None:
        return f"no: {reason}"
    failures: dict[str, None] = {}  # in order, each once
    for choice in OPERATORS.values():
        for x in samples.values():
            result = outcome(partial(choice, backend, x))
            if result != backend:
                failures[result] = None
    return "; ".join(["works", *(f"but {failure}" for failure in failures)])


def outcome(choice: Callable[[], str]) -> str:
    """The backend chosen, or the error."""
    try:
        return choice()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
