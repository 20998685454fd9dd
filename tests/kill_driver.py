"""A run that is killed at random moments until it is done: `python tests/kill_driver.py FOLDER KILLS`, for tests/test_kill.py.

Each life of the run is a fork of one process, so that torch is imported once. Prints how many steps each death cost.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from training_case import chosen, small_settings

from model.checkpoint import LAST, load
from model.train import resume, train

# More steps than all lives together can make: the last life is given fewer.
SETTINGS = ["steps=100000", "eval_every=4", "log_every=2", "dropout=0.1", "ema=0.9", "schedule=wsd", "decay=1e-5"]


def live(folder, steps, told):
    """Train until the end or the kill; tell each step that is done."""
    from model import train as training

    real = training.take_note

    def telling(state, *args):
        os.write(told, b".")
        real(state, *args)

    training.take_note = telling
    settings = [*small_settings(folder), *SETTINGS, "sample_tokens=5", "name=killed", f"steps={steps}"]
    if (folder / "killed" / LAST).exists():
        resume(folder / "killed", [f"steps={steps}"], quiet=True)
    else:
        train(chosen(settings), quiet=True)


def life(folder, steps, until=None, seconds=0.0):
    """How many steps a life has made that ends so many seconds after its step number `until`, or by itself."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        try:
            live(folder, steps, write)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    made = 0
    if until is not None:
        while made < until and (more := os.read(read, until - made)):
            made += len(more)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    while more := os.read(read, 4096):
        made += len(more)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if until is None else -signal.SIGKILL), status
    return made


def main(folder, kills):
    torch.set_num_threads(1)
    # What a first run imports and sets up, no life has to.
    train(chosen([*small_settings(folder), "name=first", "steps=1"]), quiet=True)
    rng, lost, at = random.Random(7), [], 0
    for _ in range(kills):
        at += life(folder, 100_000, rng.randint(1, 7), rng.uniform(0.0, 0.03))
        path = folder / "killed" / LAST
        kept = load(path)["step"] if path.exists() else 0
        lost.append(at - kept)
        at = kept
    steps = at + 7
    life(folder, steps)
    print(json.dumps({"lost": lost, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
