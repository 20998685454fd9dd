"""Compile the CUDA kernels of csrc for any GPU without one, and read from the machine code what they will cost.

A file holds its kernel in several instances (tiles, dtypes, options): each is one row, by its template's arguments. Needs
nvcc and c++filt, the folder csrc, and triton for the disassembler that it brings along; no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from gptkernels import static
from gptkernels.static_table import KNOWN_ARCHES

CSRC = Path(__file__).parent.parent / "csrc"
CACHE = CSRC.parent / "build" / "cubin"
ARCHES = (75, *KNOWN_ARCHES)
FLAGS = ("-cubin", "-O3", "-std=c++20", "-Werror", "all-warnings")
# Kernels that multiply matrices, on tensor cores where they are of 16-bit numbers.
MATRIX = ("gemm_kernel", "attention_forward", "attention_key_gradient", "attention_query_gradient")
# A kernel's machine code, and beside it what it was compiled for.
CODE = re.compile(r"^\s*\.section\s+\.text\.(\w+),.*$", re.M)
THREADS = re.compile(r"\.nv\.info\.(\w+),(?:(?!\.section\s).)*?EIATTR_MAX_THREADS.*?\.word\s+0x([0-9a-f]+)", re.S)
USAGE = re.compile(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instance on one architecture; instructions are counted in the code, not in a run of it."""

    op: str
    name: str  # with the arguments of its template
    arch: int
    registers: int
    spilled: int  # bytes of stack and local memory a thread
    spilled_in_loops: int  # instructions that move them, in loops
    shared: int  # bytes of a block that do not depend on the launch
    threads: int
    tensor_cores: int  # HMMA instructions
    cp_async: int
    ldmatrix: int
    widest_load: int  # bytes of a thread's widest load from global memory
    widest_store: int
    instructions: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def unavailable() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if not CSRC.is_dir():
        return f"the sources of the CUDA kernels are not at {CSRC}: run it in a clone, installed by `pip install -e .`"
    missing = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found on the PATH: install the CUDA toolkit, binutils" if missing else None


def sources(op: str) -> list[Path]:
    """The .cu files of the operators with `op` in their name."""
    return [path for path in sorted(CSRC.glob("*/*_cuda.cu")) if op in path.parent.name]


def table(arches: Sequence[int], op: str, jobs: int) -> Iterator[Kernel]:
    """Every instance of every kernel, file by file, compiled by `jobs` processes. ValueError if there is none."""
    if not sources(op):
        raise ValueError(f"no kernels of an operator called {op!r}")
    with ThreadPoolExecutor(jobs) as pool:
        files, archs = zip(*product(sources(op), arches), strict=True)
        for kernels in pool.map(kernels_of, files, archs):
            yield from kernels


def kernels_of(source: Path, arch: int) -> list[Kernel]:
    """The kernels of one file."""
    cubin = compiled(source, arch)
    usage, code = static.run_tool("cuobjdump", "--dump-resource-usage", cubin), static.run_tool("nvdisasm", cubin)
    bodies = dict(zip(*[iter(CODE.split(code)[1:])] * 2, strict=True))
    threads = {name: int(count, 16) for name, count in THREADS.findall(code)}
    resources = {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(usage)}
    names = demangled(list(resources))
    return [
        kernel_of(source.parent.name, readable, arch, resources[name], threads.get(name, 0), bodies[name])
        for name, readable in zip(resources, names, strict=True)
    ]


def kernel_of(op: str, name: str, arch: int, usage: tuple[int, ...], threads: int, code: str) -> Kernel:
    """The figures of one kernel from (registers, stack, shared, local) and its disassembly."""
    families, in_code = static.counted(code)
    registers, stack, shared, local = usage
    return Kernel(
        op=op,
        name=name,
        arch=arch,
        registers=registers,
        spilled=stack + local,
        shared=shared,
        threads=threads,
        tensor_cores=families["HMMA"],
        cp_async=families["LDGSTS"],
        ldmatrix=families["LDSM"],
        **in_code,
    )


def compiled(source: Path, arch: int) -> Path:
    """The file's cubin, kept until something changes that it is made from."""
    command = ["nvcc", *FLAGS, f"-arch=sm_{arch}", f"-I{CSRC}", str(source)]
    content = hashlib.sha256(repr(command).encode())
    content.update(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    for path in [source, *sorted(CSRC.rglob("*.h")), *sorted(CSRC.rglob("*.cuh"))]:
        content.update(path.read_bytes())
    cubin = CACHE / f"{source.stem}_{arch}_{content.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(f".{os.getpid()}")
        process = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {process.stderr.strip() or process.stdout.strip()}")
        part.rename(cubin)
    return cubin


def demangled(names: list[str]) -> list[str]:
    """gemm_kernel<Tile<bf16, 128, 2>, Store<bf16> > for each mangled name."""
    process = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    found = []
    for line in process.stdout.splitlines():
        text = re.sub(r"gptkernels::|\(anonymous namespace\)::|^void ", "", line)
        depth = 0
        for i, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                text = text[:i]
                break
        found.append(text.replace(" >", ">"))
    return found


def problems(kernel: Kernel) -> list[str]:
    """What a kernel must not show, in words; empty if it is as it should be."""
    found = static.spills(kernel.spilled, kernel.spilled_in_loops, around_loops=0)
    half = re.search(r"\b(bf16|fp16)\b", kernel.name)
    # Before sm_80 bfloat16 has no product, and no tile of more than 64 KiB a place: those kernels are empty.
    empty = kernel.arch < 80 and half is not None and (half[1] == "bf16" or kernel.instructions < 8)
    if kernel.name.startswith(MATRIX) and half and not empty:
        if not kernel.tensor_cores:
            found.append("multiplies 16-bit matrices without tensor cores")
        if not kernel.cp_async and kernel.arch >= 80:
            found.append("loads its matrices without cp.async")
        if kernel.widest_load < 16:
            found.append(f"loads no more than {kernel.widest_load} bytes at once")
    return found
