"""Two ranks of training over gloo, forked from one process so that torch is imported once: results go into a folder.

Run as `python tests/ranks_driver.py FOLDER`; tests/test_ranks.py reads what comes out.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # imported once, before the fork, as what follows
from torch.distributed.fsdp import fully_shard  # noqa: F401
from training_case import KINDS, RUN, TEXT, chosen, gradients, small_settings, some_batch

from model import evaluate as evaluation
from model import optimize, ranks
from model.checkpoint import build_model
from model.data import all_windows, load_dataset
from model.guard import check_evaluation, failure
from model.state import prepare
from model.train import resume, step_batch, train

# A run that can stop anywhere: its learning rates do not look at the number of steps.
HALF = [*RUN, "steps=6", "schedule=wsd", "decay=0.01"]
# What FSDP2 calls, under its newer name and its older one.
REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def step_gradients(settings, joined):
    """Loss and gradients of a step whose targets are spread unevenly on ranks and micro batches, and exchanges made."""
    found = {}
    real = getattr(dist, REDUCE)
    for kind in KINDS:
        config = chosen(settings, "vocab_size=11", f"parallel={kind}")
        torch.manual_seed(0)
        learner = optimize.Learner(config, build_model(config), 2, joined)
        exchanges = []

        def hook(state, bucket, exchanges=exchanges):
            exchanges.append(0)
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(halved)

        def counted(*args, exchanges=exchanges, **kwargs):
            exchanges.append(0)
            return real(*args, **kwargs)

        if kind == "ddp":
            learner.forward.register_comm_hook(None, hook)
        setattr(dist, REDUCE, counted)
        x, y = some_batch(11, ignored=True)
        mine = slice(4 * joined.rank, 4 * joined.rank + 4)
        found[kind] = {
            name: getattr(x, "full_tensor", x.clone)().detach()
            for name, x in gradients(learner, x[mine], y[mine], 2).items()
        }
        found[kind]["exchanges"] = len(exchanges)
    setattr(dist, REDUCE, real)
    return found


def halved(future):
    """The mean of two ranks from their sum."""
    return future.value()[0] / 2


def evaluations(settings, joined):
    """The validation loss of windows that do not divide evenly, and how many of them this rank made."""
    config = chosen(settings, "vocab_size=40")
    torch.manual_seed(0)
    model = build_model(config).eval()
    tokens = load_dataset(config.train.data, 0.1, 16).val
    real, calls = evaluation.loss_of, []

    def counting(*args):
        calls.append(0)
        return real(*args)

    evaluation.loss_of = counting
    with torch.no_grad():
        loss = evaluation.mean_loss(model, config, all_windows(tokens, 3, 16), joined)
    evaluation.loss_of = real
    return loss, len(calls)


def short_of_memory(settings, joined, from_call, *more):
    """Sizes of the forwards of both ranks in a run where the second one cannot hold three sequences after some calls."""
    real, calls = optimize.loss_of, []

    def tight(model, config, x, y, seed=None):
        calls.append(len(x))
        loss = real(model, config, x, y, seed)
        if joined.rank == 1 and len(x) > 2 and len(calls) > from_call:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB\nand more of a message")
        return loss

    optimize.loss_of = tight
    train(chosen(settings, *more), quiet=True)
    optimize.loss_of = real
    both = [None, None]
    dist.all_gather_object(both, calls)
    return both


def other_data(settings, folder, joined):
    """What each rank says where they have texts of the same characters, but not the same."""
    path = folder / f"text-{joined.rank}.txt"
    path.write_text((TEXT + TEXT[::-1]) * 9 if joined.rank else (TEXT[::-1] + TEXT) * 9)
    try:
        train(chosen(settings, f"data={path}", "name=other"), quiet=True)
    except ValueError as error:
        words = [None, None]
        dist.all_gather_object(words, str(error))
        return words
    raise AssertionError("they were trained")


def one_bad_number(settings, joined, kind):
    """What both ranks say of a weight that is not finite, of which under FSDP one of them has the part."""
    config = chosen(settings, f"parallel={kind}", "name=bad")
    state = prepare(config, None)
    with torch.no_grad():
        weight = state.model.transformer.h[1].mlp.c_fc.weight
        local = getattr(weight, "to_local", lambda: weight)()
        if joined.rank == 1 or kind == "ddp":
            local[3, 5] = math.nan
    said = str(failure(state.learner, 4, *step_batch(state, 4), math.nan, math.nan))
    try:
        check_evaluation(state.learner, 4, [math.nan])
    except RuntimeError as error:
        said += str(error)
    words = [None, None]
    dist.all_gather_object(words, said)
    return words


def work(folder):
    """Everything that one rank does."""
    faulthandler.dump_traceback_later(900, exit=True)  # ranks that wait for each other say where
    torch.set_num_threads(1)
    settings = small_settings(folder)
    joined = ranks.join(torch.device("cpu"))
    found = {"gradients": step_gradients(settings, joined), "other data": other_data(settings, folder, joined)}
    loss, calls = evaluations(settings, joined)
    found["loss"], found["calls"] = loss, [int(joined.total(torch.tensor(float(calls)))), calls]
    for kind in KINDS:
        train(chosen(settings, *RUN, f"parallel={kind}", f"name={kind}"), quiet=True)
    for kind in KINDS:
        train(chosen(settings, "micro_batch=2", f"parallel={kind}", f"name=two-{kind}"), quiet=True)
        found[f"short-{kind}"] = short_of_memory(settings, joined, 0, f"parallel={kind}", f"name=short-{kind}")
    found["short-later"] = short_of_memory(settings, joined, 4, "name=short-later")
    train(chosen(settings, *RUN, "parallel=fsdp", "offload=on", "name=offloaded"), quiet=True)
    # Kept by one kind, gone on with by the other, by the same, and in the tests by one process.
    for name in ("parted", "single", "halved"):
        train(chosen(settings, *HALF, "parallel=fsdp", f"name={name}"), quiet=True)
    train(chosen(settings, *HALF, "name=entire"), quiet=True)
    train(chosen(settings, *HALF, "steps=12", "parallel=fsdp", "name=straight"), quiet=True)
    resume(folder / "parted", ["steps=12", "parallel=ddp"], quiet=True)
    resume(folder / "halved", ["steps=12"], quiet=True)
    found |= {f"bad-{kind}": one_bad_number(settings, joined, kind) for kind in KINDS}
    if joined.first:
        torch.save(found, folder / "found.pt")


def fork_ranks(count, work):
    """Exit codes of so many ranks that call work(rank); the first one that dies of a signal takes the others with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                work(rank)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = {}
    while len(codes) < count:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] == -signal.SIGKILL:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def main(folder):
    codes = fork_ranks(2, lambda rank: work(folder))
    print(json.dumps(codes))
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
