"""A column as CUDA graphs: what the GPU needs when nobody launches kernels one by one."""

from __future__ import annotations

import torch

from benchmarks.device import Clock, CudaClock, timed
from benchmarks.harness import Column

# Before a capture every stage runs on the capture's stream: libraries make their workspaces of a stream at its first use.
# The capture is relaxed, since autograd runs the backward in a thread of its own, whose first calls would end it; whether
# a replay computes what it should is compared anyway.
WARM_UPS = 2


class Replay:
    """The stages of a column captured one by one, in one memory pool since each reads what the one before left."""

    def __init__(self, column: Column, clock: Clock | CudaClock) -> None:
        """Capture; whatever a column does that no graph can hold raises here."""
        self.name, self.column, self.clock = column.name, column, clock
        stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                for _, stage in column.stages():
                    stage()
                column.clear()
        before.wait_stream(stream)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        self.replays, self.held = [], []
        try:
            # A capture that fails leaves its stream the current one: the outer context takes it back.
            with torch.cuda.stream(before):
                for name, stage in column.stages():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="relaxed"):
                        stage()
                    # Without a reference the next stage would be given the same memory.
                    self.held.append(column.holds())
                    self.replays.append((name, graph.replay))
        finally:
            column.clear()

    def run(self) -> dict[str, float]:
        """Replay all of it; seconds of the stages and of the whole."""
        return timed(self.clock, self.replays, self.column.total)

    def results(self) -> object:
        """What a replay computes, in the form of the column's results."""
        for _, replay in self.replays:
            replay()
        torch.cuda.synchronize()
        return self.column.gathered(self.held)
