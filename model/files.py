"""Files written so that neither a reader nor a crash nor a power cut ever meets half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"


def user_path(text: str | Path) -> Path:
    """A path as somebody writes it: ~ is home also where a shell does not see it, as in out=~/runs."""
    return Path(text).expanduser()


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have `write` fill a file such that `path` is, at every moment, the old file or the new one.

    RuntimeError where the disk does not take it; the old file is then still there.
    """
    temporary = path.with_name(f".{path.name}.partial")  # in the same folder: a rename is atomic within a disk only
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = disk_error(error)
        if not reason:
            raise
        raise RuntimeError(
            f"cannot write {path}: {reason.strerror or reason}: make room there or choose another place "
            "(a file of this name that was there before is whole)"
        ) from error


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Inside, no other process holds the folder: RuntimeError where one does. One that dies lets go."""
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)  # a lock on a network's disk needs a file that can be written
    except OSError as error:
        raise RuntimeError(f"cannot write in {folder}: {error.strerror}: choose another place") from error
    try:
        if not locked(handle) or not is_at(handle, path):
            raise RuntimeError(f"another process is writing {folder}: wait for its end, or choose another place")
        try:
            yield
        finally:
            if is_at(handle, path):
                path.unlink()
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # for a forked process as well, which has the handle too
        os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def locked(handle: int) -> bool:
    """Whether this process could lock an open file; it counts as locked on a disk without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def make_ready(path: Path) -> None:
    """Make the folder of a file that is written at the end of long work. RuntimeError where it could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise RuntimeError(f"cannot write {path}: it is a folder: choose another name")
    except OSError as error:
        reason = "its folder is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise RuntimeError(f"cannot write {path}: {reason}: choose another place") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RuntimeError(f"cannot write {path}: its folder takes no files: choose another place")


def disk_error(error: BaseException) -> OSError | None:
    """What a disk said, where that is the cause of an error in writing; None where it is not."""
    # torch.save loses its stream's error: what it raises is about its own zip file then.
    reason = error if isinstance(error, OSError) else error.__context__
    return reason if isinstance(reason, OSError) else None


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file, atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
