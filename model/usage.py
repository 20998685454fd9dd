"""Wrong command lines: one line to stderr, exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn


class UsageError(Exception):
    """A wrong command line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def as_usage(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, with a wrong value counted as a wrong command line."""
    try:
        return call(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
