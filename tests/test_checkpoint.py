"""Checkpoints: whole or not there, whatever happens to the process or the disk."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from model import files
from model.checkpoint import FORMAT, LAST, load, save_atomically
from model.files import write_atomically, write_text

SAVE_UNTIL_KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from model.checkpoint import FORMAT, load, save_atomically
torch.set_num_threads(1)
path = Path(sys.argv[1])

def save_for_ever(out):
    step = 0
    while True:
        step += 1
        save_atomically({"format": FORMAT, "step": step, "model": torch.full((200_000,), float(step))}, path)
        os.write(out, b".")

for delay in (0.0, 0.002, 0.005, 0.009, 0.014, 0.02, 0.03, 0.05):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(write)
    os.close(write)
    told = len(os.read(read, 1))  # it has saved once
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 4096):
        told += len(more)
    payload = load(path.parent)
    whole = payload["model"].numel() == 200_000 and bool((payload["model"] == payload["step"]).all())
    # The last one that it told of, or the next one, which may have been in place already.
    assert whole and payload["step"] in (told, told + 1), (delay, told, payload["step"])
print("whole")
"""


def names(folder):
    return [path.name for path in folder.iterdir()]


@contextmanager
def small_disk(size):
    """Every file of this process fails to grow beyond the size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / LAST
    command = [sys.executable, "-c", SAVE_UNTIL_KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr
    save_atomically({"format": FORMAT, "step": 0}, path)
    assert names(tmp_path) == [LAST]  # what a killed process left is written over, not kept for ever


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path):
    path = tmp_path / LAST
    save_atomically({"format": FORMAT, "step": 1}, path)
    with (
        small_disk(100_000),
        pytest.raises(RuntimeError, match=f"cannot write {path}: File too large: make room there"),
    ):
        save_atomically({"format": FORMAT, "step": 2, "model": torch.zeros(200_000)}, path)
    assert load(tmp_path)["step"] == 1 and names(tmp_path) == [LAST]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "x", []
    monkeypatch.setattr(files.os, "fsync", lambda handle: events.append(path.exists()))
    write_text(path, "new")
    assert events == [False, True]  # the file before it is renamed, the folder after


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        RuntimeError, match=r"cannot write .*file/x: Not a directory: make room there or choose another place"
    ):
        write_text(tmp_path / "file" / "x", "text")


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint", b"hello world\n", b"step,loss\n", "cut"],
    ids=["empty", "text", "hello", "csv", "cut"],
)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / LAST
    save_atomically({"format": FORMAT, "model": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:20_000] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"last\.pt cannot be read as a checkpoint"):
        load(tmp_path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / LAST
    torch.save({"format": 9}, path)
    with pytest.raises(ValueError, match=f"must have checkpoint format {FORMAT}, got 9"):
        load(tmp_path)
    for payload in ([1], {"a.weight": torch.ones(2)}):
        torch.save(payload, path)
        with pytest.raises(ValueError, match=r"must be a checkpoint of a run, got another file: name a run's \.pt"):
            load(tmp_path)
    with pytest.raises(ValueError, match="RUN must be a run folder with a checkpoint"):
        load(tmp_path / "nothing")


def test_a_damaged_number_is_found(tmp_path):
    path = tmp_path / LAST
    save_atomically({"format": FORMAT, "model": torch.zeros(10_000)}, path)
    load(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt is damaged \(.*data/0 is not as it was written"):
        load(tmp_path)


class Trap:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_checkpoint_can_hold_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "model": Trap()}, tmp_path / LAST)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "sprung").exists()
