"""The lines of a run: a bar that moves on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import IO

BAR = 24
REDRAW_SECONDS = 0.1  # a step of a small model takes less: drawing each would cost time and flicker
# Left out first on a narrow terminal.
DISPENSABLE = ("gnorm", "lr", "memory", "ms", "mfu")


class Progress:
    """What a run shows while it goes on; nothing when quiet."""

    def __init__(self, quiet: bool = False, stream: IO[str] | None = None) -> None:
        self.stream: IO[str] = stream or sys.stdout
        self.quiet = quiet
        self.in_place = self.stream.isatty()
        self.drawn = 0.0

    def update(self, figures: Mapping[str, str], share: float, keep: bool) -> None:
        """Show the state of a run of which a share is done; keep: worth a line where lines cannot be overwritten."""
        if self.quiet:
            return
        now = time.perf_counter()
        if self.in_place and (share >= 1.0 or now - self.drawn >= REDRAW_SECONDS):
            self.drawn = now
            width = shutil.get_terminal_size().columns - 1  # a full last column would wrap on some terminals
            unicode = (getattr(self.stream, "encoding", None) or "").lower().startswith("utf")
            self.write(f"\r\x1b[K{bar_line(figures, share, width, unicode)}")
        elif not self.in_place and keep:
            self.write(" | ".join(figures.values()) + "\n")

    def note(self, text: str) -> None:
        """Show text that stays."""
        if not self.quiet:
            self.write(f"\r\x1b[K{text}\n" if self.in_place else f"{text}\n")

    def write(self, text: str) -> None:
        """Write at once."""
        self.stream.write(text)
        self.stream.flush()


class Whereabouts:
    """What a command without steps is at, on stderr: a line at most every ten seconds, so that a quick one says nothing."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.began = self.said = time.perf_counter()

    def __call__(self, text: str) -> None:
        """Say what begins now."""
        now = time.perf_counter()
        if now - self.said >= self.seconds:
            self.said = now
            print(f"{now - self.began:.0f} s: {text}", file=sys.stderr, flush=True)


def bar_line(figures: Mapping[str, str], share: float, width: int, unicode: bool) -> str:
    """A bar and as many of the figures as fit into the width, the least telling ones left out first."""
    kept = dict(figures)
    for name in DISPENSABLE:
        if len(" | ".join(kept.values())) + BAR // 2 < width:
            break
        kept.pop(name, None)
    text = " | ".join(kept.values())
    cells = min(BAR, width - len(text) - 1)
    if cells < 4:
        return text[:width]
    done, left = ("█", "░") if unicode else ("#", ".")
    full = round(share * cells)
    return f"{done * full}{left * (cells - full)} {text}"
