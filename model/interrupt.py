"""Ctrl-C in a training run, or a SIGTERM: stop at a good place, or at once when asked twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STDERR = 2


@dataclass
class Interrupt:
    """Whether the user has asked to stop."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The first Ctrl-C asks for a stop after the step at hand, the second one raises KeyboardInterrupt at once.

    SIGTERM is what a scheduler sends before it takes the machine away, and torchrun where another rank has failed.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # Python lets only the main thread take signals
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        for number in previous:
            signal.signal(number, signal.default_int_handler)
        # Not print: the signal may have come in the middle of another print, which may not be entered twice.
        os.write(STDERR, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
