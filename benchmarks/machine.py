"""The machine of a run: what it is, and the two roofs that its torch reaches."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.harness import Times
from gptkernels.cost import Cost

ROOT = Path(__file__).resolve().parent.parent

# 2048^3 is 17 GFLOP: far beyond every cache, and about 0.1 s on two cores, short enough to be timed every round.
MATMUL_SIZE = 2048
# Eight times a large L3, so that a copy runs from memory to memory.
COPY_BYTES = 256 << 20


class MatmulRoof:
    """A large torch matmul in the run's dtype, into memory that is already there."""

    name = "roof:matmul"

    def __init__(self, dtype: torch.dtype, size: int = MATMUL_SIZE) -> None:
        self.a = torch.randn(size, size).to(dtype)
        self.b = torch.randn(size, size).to(dtype)
        self.out = torch.empty(size, size, dtype=dtype)
        self.cost = Cost(2 * size**3, 3 * size * size * dtype.itemsize)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        torch.mm(self.a, self.b, out=self.out)
        return {"matmul": time.perf_counter() - start}


class CopyRoof:
    """A large copy, into memory that is already there."""

    name = "roof:copy"

    def __init__(self, size: int = COPY_BYTES) -> None:
        self.source = torch.ones(size // 4)
        self.target = torch.empty_like(self.source)
        self.cost = Cost(0, 2 * size)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        self.target.copy_(self.source)
        return {"copy": time.perf_counter() - start}


def roof_columns(dtype: torch.dtype, quick: bool) -> list[MatmulRoof | CopyRoof]:
    """The two roofs as columns, so that they are timed in the same rounds as the work."""
    return [MatmulRoof(dtype, 512), CopyRoof(16 << 20)] if quick else [MatmulRoof(dtype), CopyRoof()]


def roof_figures(columns: list[MatmulRoof | CopyRoof], times: dict[str, Times]) -> dict[str, float]:
    """GFLOP/s of the matmul and GB/s of the copy: by medians, as the columns are, and the best seen."""
    matmul, copy = columns
    matmul_times, copy_times = times[matmul.name]["matmul"], times[copy.name]["copy"]
    middle = sorted(matmul_times)[len(matmul_times) // 2], sorted(copy_times)[len(copy_times) // 2]
    return {
        "matmul_gflops": matmul.cost.flops / middle[0] / 1e9,
        "copy_gbps": copy.cost.bytes / middle[1] / 1e9,
        "matmul_gflops_best": matmul.cost.flops / min(matmul_times) / 1e9,
        "copy_gbps_best": copy.cost.bytes / min(copy_times) / 1e9,
    }


def describe() -> dict[str, object]:
    """Everything about the machine and the software that a figure depends on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
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
