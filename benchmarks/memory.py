"""Peak memory of one column: on a GPU that of torch's allocator, on a CPU measured in a process of its own.

On a CPU our native operators also use memory that torch's allocator does not see. The resident set sees all of it, and
the kernel keeps its high-water mark. The protocol, the same for every column:

1. a fresh process builds the work: inputs and output gradients, or model, batch and the optimizer's state; freed heap
   goes back to the system, so that nothing after it lands on memory that is resident already;
2. a warm-up at a tiny shape loads libraries and code, so that they do not count; torch.compile is compiled and warmed
   at the full shape instead, since it has no tiny form of the same code (what it keeps from that is in its favour);
3. freed heap goes back again, and what is then resident is the baseline;
4. the high-water mark is reset, the work runs three times at the full shape (once where it takes half a minute), and
   the mark is read.

peak = mark - baseline. So a workspace that an operator keeps for its next call counts in full, as it should. The
gradients of parameters and inputs are part of the peak of every column; `beyond gradients` leaves them out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import Column

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RUNS = 3
# A column that takes so long is not run again: its peak is that of one run.
ENOUGH_SECONDS = 30.0


def peak_figures(column: Column, gradient_bytes: int) -> dict[str, float]:
    """Megabytes that the column needs above what is resident now."""
    give_back_heap()
    baseline = resident_bytes("VmRSS")
    CLEAR_REFS.write_text("5")  # 5 resets the high-water mark; see proc(5)
    began = time.perf_counter()
    for _ in range(RUNS):
        column.run()
        if time.perf_counter() - began > ENOUGH_SECONDS:
            break
    return beside_gradients(resident_bytes("VmHWM") - baseline, gradient_bytes)


def gpu_peak(column: Column, gradient_bytes: int) -> dict[str, float]:
    """Megabytes that torch's allocator hands out at the peak of a run, above what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    column.run()
    torch.cuda.synchronize()
    return beside_gradients(torch.cuda.max_memory_allocated() - before, gradient_bytes)


def beside_gradients(peak: int, gradient_bytes: int) -> dict[str, float]:
    """A peak in megabytes, with the gradients and without them."""
    peak = max(0, peak)
    return {
        "peak_mb": peak / 1e6,
        "gradients_mb": gradient_bytes / 1e6,
        "peak_beyond_gradients_mb": max(0, peak - gradient_bytes) / 1e6,
    }


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no field {field}")


def give_back_heap() -> None:
    """Collect garbage and return freed heap to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measured_in_subprocess(work: dict[str, object]) -> dict[str, float | str]:
    """The peak of one column in a fresh process, or the reason why it could not be measured."""
    if not CLEAR_REFS.exists():
        return {"unavailable": "needs Linux's /proc/self/clear_refs"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(work)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if done.returncode != 0:
        return {"unavailable": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    """`python -m benchmarks.memory JSON`: what the parent process runs; the JSON names the work and the column."""
    from benchmarks import ops, train_step

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory of one column.")
    parser.add_argument("work", help="the work as JSON: kind (ops or train), column and what that kind needs")
    work = json.loads(parser.parse_args(argv).work)
    torch.set_num_threads(work["threads"])
    column, gradient_bytes = (ops if work["kind"] == "ops" else train_step).peak_work(work)
    print(json.dumps(peak_figures(column, gradient_bytes)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
