"""What the command line decides for a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """Choices that hold for every case of a run."""

    device: str = "cpu"
    dtype: str = "fp32"
    backend: str = "auto"
    rounds: int = 20
    budget: float = 600.0
    quick: bool = False
    cache: str = "as-is"
    compile: bool = True
    memory: bool = True
    breakdown: bool = False

    def work(self) -> dict[str, object]:
        """What a process that measures memory must know."""
        return {"dtype": self.dtype, "backend": self.backend, "threads": torch.get_num_threads()}
