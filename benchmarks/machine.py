"""The machine of a run: what it is, and the roofs that its torch reaches."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Column, Times
from gptkernels.backend import cpu_library
from gptkernels.cost import Cost

ROOT = Path(__file__).resolve().parent.parent

# 2048^3 is 17 GFLOP: far beyond every cache, and about 0.1 s on two cores, short enough to be timed every round.
LARGEST_MATMUL = 2048
SMALLEST_MATMUL = 512
# Where torch has no fast matmul of a dtype (bf16 without AVX-512: 54 s for 2048^3), the size shrinks to this time.
MATMUL_SECONDS = 0.5
# Whether the operands are stored transposed. They are the products of a linear layer: torch's speed can differ by a
# factor of 20 between them, and a roof is the fastest.
LAYOUTS = {"A B^T": (False, True), "A B": (False, False), "A^T B": (True, False)}
# Eight times a large L3, so that a copy runs from memory to memory.
COPY_BYTES = 256 << 20


class MatmulRoof:
    """A large torch matmul in one dtype, into memory that is already there."""

    def __init__(self, dtype: torch.dtype, size: int, layout: str) -> None:
        self.name = f"roof:matmul {dtype}"
        self.size, self.layout = size, layout
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        transpose_a, transpose_b = LAYOUTS[layout]
        self.a, self.b = a.t() if transpose_a else a, b.t() if transpose_b else b
        self.out = torch.empty(size, size, dtype=dtype)
        self.cost = Cost(2 * size**3, 3 * size * size * dtype.itemsize)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        torch.mm(self.a, self.b, out=self.out)
        return {"matmul": time.perf_counter() - start}

    @classmethod
    def fitted(cls, dtype: torch.dtype, largest: int) -> MatmulRoof:
        """The fastest layout, at the largest size that takes no longer than MATMUL_SECONDS."""
        probes = [cls(dtype, SMALLEST_MATMUL, layout) for layout in LAYOUTS]
        seconds = [min(probe.run()["matmul"] for _ in range(2)) for probe in probes]
        best = min(range(len(probes)), key=seconds.__getitem__)
        size, expected = SMALLEST_MATMUL, seconds[best]
        while size < largest and 8 * expected <= MATMUL_SECONDS:
            size, expected = 2 * size, 8 * expected
        return cls(dtype, size, probes[best].layout)


class CopyRoof:
    """A large copy, into memory that is already there."""

    name = "roof:copy"

    def __init__(self, size: int) -> None:
        self.source = torch.ones(size // 4)
        self.target = torch.empty_like(self.source)
        self.cost = Cost(0, 2 * size)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        self.target.copy_(self.source)
        return {"copy": time.perf_counter() - start}


class Roofs:
    """The roofs as columns, so that they are timed in the same rounds as the work."""

    def __init__(self, dtypes: Sequence[torch.dtype], quick: bool) -> None:
        largest = SMALLEST_MATMUL if quick else LARGEST_MATMUL
        self.matmuls = {dtype: MatmulRoof.fitted(dtype, largest) for dtype in dtypes}
        self.copy = CopyRoof(COPY_BYTES // 16 if quick else COPY_BYTES)
        self.columns: list[Column] = [*self.matmuls.values(), self.copy]

    def flops(self, times: dict[str, Times], dtype: torch.dtype) -> float:
        """Flops a second of the matmul in this dtype: by median, as the columns are."""
        matmul = self.matmuls[dtype]
        return matmul.cost.flops / statistics.median(times[matmul.name]["matmul"])

    def bytes(self, times: dict[str, Times]) -> float:
        """Bytes a second of the copy, read and written."""
        return self.copy.cost.bytes / statistics.median(times[self.copy.name]["copy"])

    def figures(self, times: dict[str, Times]) -> dict[str, object]:
        """GFLOP/s of the matmuls with their sizes, and GB/s of the copy."""
        matmuls = {
            str(dtype).removeprefix("torch."): {
                "gflops": self.flops(times, dtype) / 1e9,
                "gflops_best": matmul.cost.flops / min(times[matmul.name]["matmul"]) / 1e9,
                "size": matmul.size,
                "layout": matmul.layout,
            }
            for dtype, matmul in self.matmuls.items()
        }
        return {"matmul": matmuls, "copy_gbps": self.bytes(times) / 1e9}


def describe() -> dict[str, object]:
    """Everything about the machine and the software that a figure depends on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": cpu_library()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that ran, with `+changes` if the working tree differs from it."""
    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """The output of a git command in the project's folder."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
