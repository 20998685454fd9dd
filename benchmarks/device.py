"""Where a benchmark runs: how time is taken there, what the caches hold before a run, and what memory a run needs.

A cold run follows an overwriting of the caches, a warm one an untimed run of the same work; else they hold what the column
before has left, which on a CPU is the default.

On a GPU the time is that between events on the stream, from an idle GPU on. Overwriting the L2 cache or the untimed run
occupies it while the host enters the work, so that what the host needs for a launch shows only where it needs longer than
the GPU does. `host` is the host's own time for the launches of a run, and a CUDA graph (benchmarks/graph.py) is the time
without them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Stages = Sequence[tuple[str, Callable[[], None]]]

COLD, WARM, AS_IT_COMES = "cold", "warm", "as-is"
# The L2 of an H100 holds 50 MB, that of the next ones 126; a CPU's L3 may hold as much.
FLUSH_BYTES = 256 << 20


class Clock:
    """Laps of the CPU's time."""

    host: float | None = None

    def __init__(self, cache: str) -> None:
        self.warm = cache == WARM
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8) if cache == COLD else None
        self.marks: list[float] = []

    def start(self) -> None:
        """Overwrite the caches if they shall be cold, and begin the first lap."""
        if self.flushed is not None:
            self.flushed.zero_()
        self.marks = [time.perf_counter()]

    def lap(self) -> None:
        """End a lap, begin the next."""
        self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds of the laps."""
        return [after - before for before, after in pairwise(self.marks)]


class CudaClock:
    """Laps of the current stream's time; see this file's head."""

    def __init__(self, cache: str) -> None:
        self.warm = cache == WARM
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cache == COLD else None
        self.marks: list[torch.cuda.Event] = []
        self.began, self.host = 0.0, 0.0

    def start(self) -> None:
        """Overwrite the cache if it shall be cold, and begin the first lap."""
        if not self.warm:
            torch.cuda.synchronize()
        if self.flushed is not None:
            self.flushed.zero_()
        self.marks = []
        self.lap()
        self.began = time.perf_counter()

    def lap(self) -> None:
        """End a lap, begin the next."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Seconds of the laps, once the GPU has done them."""
        self.host = time.perf_counter() - self.began
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.marks)]


@functools.cache
def clock_of(device: str, cache: str = AS_IT_COMES) -> Clock | CudaClock:
    """The one clock of a device: the memory that it overwrites is allocated once."""
    return CudaClock(cache) if device == "cuda" else Clock(cache)


def warm_up(clock: Clock | CudaClock, stages: Stages, clear: Callable[[], None] | None = None) -> None:
    """Do the work once where the caches shall be warm; clear gives back what it has made."""
    if clock.warm:
        for _, stage in stages:
            stage()
        if clear is not None:
            clear()


def timed(
    clock: Clock | CudaClock, stages: Stages, total: str, clear: Callable[[], None] | None = None
) -> dict[str, float]:
    """Seconds of each stage, done one after another, and of all of them under the name total; clear as in warm_up."""
    warm_up(clock, stages, clear)
    clock.start()
    for _, stage in stages:
        stage()
        clock.lap()
    laps = clock.laps()
    host = {} if clock.host is None else {"host": clock.host}
    return {**{name: lap for (name, _), lap in zip(stages, laps, strict=True)}, total: sum(laps), **host}
