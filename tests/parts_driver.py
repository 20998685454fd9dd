"""Checkpoints in parts by two ranks that are killed in the middle of a save, and read by three.

Run as `python tests/parts_driver.py FOLDER`; tests/test_parts.py reads what comes out. Prints, for each death, of which rank
and before which event of a save it was, and the numbers of the checkpoints before and after it.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from ranks_driver import fork_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from training_case import chosen, small_settings

from model import checkpoint, ranks, state
from model.checkpoint import FORMAT, LAST, load
from model.config import build
from model.train import resume, train

# What a save does to the disk.
EVENTS = [(os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")]
SETTINGS = ["parallel=fsdp", "steps=12", "eval_every=4", "log_every=2", "eval_batches=0", "ema=0.9", "sample_tokens=5"]


def deadly(event):
    """Let this process be killed before the event of this number from here on, from 0."""
    left = [event]

    def counted(real):
        def call(*args, **kwargs):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for place, name in EVENTS:
        setattr(place, name, counted(getattr(place, name)))


def save_and_die(folder, number, dying, event, rank):
    """Save tensors full of a number, one of them in parts, but be killed before an event of it."""
    joined = ranks.join(torch.device("cpu"))
    mine = torch.full((4 - rank, 4), float(number))
    part = DTensor.from_local(mine, init_device_mesh("cpu", (2,)), [Shard(0)], shape=(7, 4), stride=(4, 1))
    tensors = {"model.a": part, "optimizer.0.step": torch.tensor(float(number))}
    if rank == dying:
        deadly(event)
    payload = {"format": FORMAT, "config": {"model.tie": False}, "number": number, "parts": tensors}
    checkpoint.save(payload, folder / LAST, joined)


def deaths(folder):
    """[rank, event, number before, number after] of a death before every event of a save of each rank."""
    found, number = [], 0
    for rank in (1, 0):
        event, codes = 0, None
        while codes != [0, 0]:
            number += 1
            codes = fork_ranks(2, partial(save_and_die, folder, number, rank, event))
            assert codes == [0, 0] or codes[rank] == -signal.SIGKILL, codes
            payload = load(folder) if (folder / LAST).exists() else {"number": 0, "model": {}}
            after = payload["number"]
            assert all(bool((x == after).all()) and x.shape == (7, 4) for x in payload["model"].values())
            assert after in (number, found[-1][-1] if found else 0)
            found.append([rank, event, number, after])
            event += 1
    return found


def train_and_die(folder, rank):
    """A run whose first rank is killed in the middle of its second save of the last checkpoint."""
    real = checkpoint.save

    def save(payload, path, joined):
        if path.name == LAST and payload["step"] == 8 and joined.first:
            deadly(3)
        real(payload, path, joined)

    checkpoint.save = save
    train(chosen(small_settings(folder), *SETTINGS, "name=killed"), quiet=True)


def save_again(folder, rank):
    """Read a checkpoint of two ranks as this number of ranks does, and write it as another run's."""
    payload = load(folder / "unbroken", LAST, tensors=())
    again = state.prepare(build(payload["config"] | {"train.batch": 6}), folder, payload)
    (folder / "again").mkdir(exist_ok=True)
    checkpoint.save(payload | again.learner.pack(), folder / "again" / LAST, again.ranks)


def main(folder):
    faulthandler.dump_traceback_later(900, exit=True)  # ranks that wait for each other say where
    torch.set_num_threads(1)
    train(chosen(small_settings(folder), "name=first", "steps=1"), quiet=True)  # its imports, once
    (folder / "deaths").mkdir()
    found = deaths(folder / "deaths")
    assert fork_ranks(2, partial(train_and_die, folder))[0] == -signal.SIGKILL
    killed_at = load(folder / "killed", LAST, tensors=())["step"]
    unbroken = chosen(small_settings(folder), *SETTINGS, "name=unbroken")
    for work in (lambda rank: resume(folder / "killed", quiet=True), lambda rank: train(unbroken, quiet=True)):
        assert fork_ranks(2, work) == [0, 0]
    assert fork_ranks(3, partial(save_again, folder)) == [0, 0, 0]
    print(json.dumps({"deaths": found, "killed_at": killed_at}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
