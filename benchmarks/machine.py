"""The machine of a run: what it is, and the roofs that its torch reaches."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from benchmarks.device import AS_IT_COMES, clock_of, timed
from benchmarks.harness import Timed, Times
from benchmarks.options import Options
from gptkernels.backend import cores_apart, cpu_library
from gptkernels.cost import Cost
from model.machine import commit, now, processor_name

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
# 8192^3 is 1.1 TFLOP and fills every GPU many times over; in float32 without TF32 it takes about 20 ms.
GPU_MATMUL, GPU_COPY_BYTES = 8192, 2 << 30
GPU_QUICK_MATMUL = 2048


class MatmulRoof:
    """A large torch matmul in one dtype, into memory that is already there."""

    def __init__(
        self, dtype: torch.dtype, size: int, layout: str, device: str = "cpu", cache: str = AS_IT_COMES
    ) -> None:
        self.name = f"roof:matmul {dtype}"
        self.size, self.layout, self.clock = size, layout, clock_of(device, cache)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        transpose_a, transpose_b = LAYOUTS[layout]
        self.a, self.b = a.t() if transpose_a else a, b.t() if transpose_b else b
        self.out = torch.empty(size, size, dtype=dtype, device=device)
        self.cost = Cost(2 * size**3, 3 * size * size * dtype.itemsize)

    def multiply(self) -> None:
        """The product."""
        torch.mm(self.a, self.b, out=self.out)

    def run(self) -> dict[str, float]:
        """Seconds of the product."""
        return timed(self.clock, (("product", self.multiply),), "matmul")

    @classmethod
    def fastest(cls, dtype: torch.dtype, size: int, device: str, cache: str) -> MatmulRoof:
        """The fastest layout at one size."""
        probes = (cls(dtype, size, layout, device, cache) for layout in LAYOUTS)
        return min(probes, key=lambda probe: min(probe.run()["matmul"] for _ in range(3)))

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

    def __init__(self, size: int, device: str = "cpu", cache: str = AS_IT_COMES) -> None:
        self.source = torch.ones(size // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.cost, self.clock = Cost(0, 2 * size), clock_of(device, cache)

    def copy(self) -> None:
        """The copy."""
        self.target.copy_(self.source)

    def run(self) -> dict[str, float]:
        """Seconds of the copy."""
        return timed(self.clock, (("transfer", self.copy),), "copy")


class CoreDistance:
    """From a core to another and back: no roof, but a virtual machine's cores may move, and times with them."""

    name = "roof:cores"

    def run(self) -> dict[str, float]:
        """Seconds there and back, if there are two threads."""
        seconds = cores_apart()
        return {} if seconds is None else {"cores": seconds}


class Roofs:
    """The roofs as columns, so that they are timed in the same rounds as the work."""

    def __init__(
        self, matmuls: dict[torch.dtype, MatmulRoof], copy: CopyRoof, cores: CoreDistance | None = None
    ) -> None:
        self.matmuls, self.copy = matmuls, copy
        self.columns: list[Timed] = [*matmuls.values(), copy, *([cores] if cores else [])]

    def flops(self, times: dict[str, Times], dtype: torch.dtype) -> float:
        """Flops a second of the matmul in this dtype: by median, as the columns are."""
        matmul = self.matmuls[dtype]
        return matmul.cost.flops / statistics.median(times[matmul.name]["matmul"])

    def bytes(self, times: dict[str, Times]) -> float:
        """Bytes a second of the copy, read and written."""
        return self.copy.cost.bytes / statistics.median(times[self.copy.name]["copy"])

    def figures(self, times: dict[str, Times]) -> dict[str, object]:
        """GFLOP/s of the matmuls with their sizes, GB/s of the copy, and ns between cores: all of them, sorted."""
        matmuls = {
            str(dtype).removeprefix("torch."): {
                "gflops": self.flops(times, dtype) / 1e9,
                "gflops_best": matmul.cost.flops / min(times[matmul.name]["matmul"]) / 1e9,
                "size": matmul.size,
                "layout": matmul.layout,
            }
            for dtype, matmul in self.matmuls.items()
        }
        apart = times.get(CoreDistance.name, {}).get("cores", [])
        figures = {"matmul": matmuls, "copy_gbps": self.bytes(times) / 1e9}
        return figures | ({"cores_ns": sorted(round(1e9 * seconds) for seconds in apart)} if apart else {})


def roofs_of(dtypes: Sequence[torch.dtype], options: Options) -> Roofs:
    """The roofs of a case in these dtypes."""
    if options.device == "cuda":
        return gpu_roofs(tuple(dtypes), options.quick, options.cache)
    largest = SMALLEST_MATMUL if options.quick else LARGEST_MATMUL
    matmuls = {dtype: MatmulRoof.fitted(dtype, largest) for dtype in dtypes}
    return Roofs(matmuls, CopyRoof(COPY_BYTES // 16 if options.quick else COPY_BYTES), CoreDistance())


@functools.cache
def gpu_roofs(dtypes: tuple[torch.dtype, ...], quick: bool, cache: str) -> Roofs:
    """The roofs of a GPU, the same in all cases of a run."""
    size = GPU_QUICK_MATMUL if quick else GPU_MATMUL
    matmuls = {dtype: MatmulRoof.fastest(dtype, size, "cuda", cache) for dtype in dtypes}
    return Roofs(matmuls, CopyRoof(GPU_COPY_BYTES // 16 if quick else GPU_COPY_BYTES, "cuda", cache))


def describe(device: str = "cpu") -> dict[str, object]:
    """Everything about the machine and the software that a figure depends on."""
    return {
        **(describe_gpu() if device == "cuda" else {}),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": cpu_library()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": now(),
        "load_average": os.getloadavg()[0],
    }


def describe_gpu() -> dict[str, object]:
    """The GPU, its driver, and the software that compiles for it."""
    gpu = torch.cuda.get_device_properties()
    return {
        "gpu": gpu.name,
        "sm_count": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mb": gpu.L2_cache_size / 1e6,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "triton": getattr(importlib.import_module("triton"), "__version__", None) if find_spec("triton") else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def driver() -> str:
    """The driver's version, clocks and power limit as nvidia-smi tells them."""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
