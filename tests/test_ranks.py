"""Two ranks over gloo against one process: gradients, exchanges, evaluation, whole runs, checkpoints, and a death."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_case import (
    KINDS,
    RUN,
    assert_same_run,
    chosen,
    driver_environment,
    gradients,
    same_values,
    same_weights,
    small_settings,
    some_batch,
)

from model import evaluate as evaluation
from model.checkpoint import BEST, LAST, build_model, load, load_model
from model.config import resolve
from model.data import all_windows, load_dataset
from model.optimize import Learner
from model.ranks import Ranks, join
from model.reference import GPT
from model.run_files import read_metrics
from model.state import check_shares
from model.train import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")

DRIVER = Path(__file__).with_name("ranks_driver.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder, what the two ranks found): one start for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(DRIVER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=driver_environment())
    assert done.stdout == "[0, 0]\n", done.stderr
    return folder, torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def alone(both):
    """The same run in one process."""
    torch.set_num_threads(1)
    return train(chosen(small_settings(both[0]), *RUN, "name=alone"), quiet=True)


def one_model(ours, theirs):
    """Whether two models' tensors are the same but for rounding, the keys' biases left out.

    Such a bias adds one number to all scores of a row, which softmax takes away again: its gradient is 0 but for rounding
    errors, of which AdamW makes steps as large as of any gradient.
    """
    known = [
        [torch.cat((x[:16], x[32:])) if x.shape == (48,) else x for x in map(torch.Tensor.detach, tensors)]
        for tensors in (ours, theirs)
    ]
    return all((a - b).abs().max() < 1e-5 for a, b in zip(*known, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_one_process(both, kind):
    """Targets are spread unevenly on ranks and micro batches: the mean of means would be far off."""
    config = resolve("tiny", ["n_embd=16", "vocab_size=11"])[0]
    torch.manual_seed(0)
    learner = Learner(config, build_model(config), 8)
    x, y = some_batch(11, ignored=True)
    plain = gradients(learner, x, y, 8)
    oracle = GPT(config.model).double()
    oracle.load_state_dict(learner.model.state_dict())
    loss = oracle(x, y)[1]
    loss.backward()
    exact = {"loss": loss} | {name: p.grad for name, p in oracle.named_parameters()}
    found = both[1]["gradients"][kind]
    for name, value in exact.items():
        # As for one process, and one more rounding for each of four micro batches and two ranks.
        budget = 3 * (plain[name] - value).abs().max() + 6 * 6e-8 * value.abs().max()
        assert found[name].shape == value.shape and (found[name] - value).abs().max() <= budget, name


def test_ranks_with_different_texts_are_refused(both):
    """Each reads its own: as of a folder that was copied to each machine, and changed on one."""
    first, second = both[1]["other data"]
    assert "data of rank 0, got another text on another rank" in first
    assert re.search(r"got .*text-1\.txt.* on rank 1: name one that all see", second)
    assert not (both[0] / "other").exists()


def test_a_weight_that_is_not_finite_is_named_by_the_rank_that_has_it(both):
    """And no rank goes on to an exchange that the other one does not come to."""
    name = r"not finite first: transformer\.h\.1\.mlp\.c_fc\.weight \(1 of 1024 values\)"
    first, second = both[1]["bad-fsdp"]
    assert len(re.findall("not finite first: on another rank", first)) == 2 and len(re.findall(name, second)) == 2
    assert all(len(re.findall(name, said)) == 2 for said in both[1]["bad-ddp"])


def test_memory_that_runs_out_without_a_word_is_told():
    """A MemoryError of C++ has no words."""
    config, _ = resolve("tiny", ["n_embd=16", "vocab_size=11", "micro_batch=4"])
    learner = Learner(config, build_model(config), 4)
    learner.ranks = Ranks(0, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "accumulate", lambda *_: (_ for _ in ()).throw(MemoryError()))
        patch.setattr(Learner, "weight", lambda *_: None)
        with pytest.raises(RuntimeError, match=r"micro_batch=4 does not fit into memory \(out of memory\)"):
            learner.gradients(0, *some_batch(11, ignored=False))


def test_ranks_exchange_gradients_once_a_step(both):
    """Of two micro batches each: DDP has one bucket for so small a model, FSDP a group for each block and the rest."""
    assert [both[1]["gradients"][kind]["exchanges"] for kind in KINDS] == [1, 3]


def test_evaluation_is_shared_out(both):
    folder, found = both
    config = chosen(small_settings(folder), "vocab_size=40")
    torch.manual_seed(0)
    model = build_model(config).eval()
    tokens = load_dataset(config.train.data, 0.1, 16).val
    with torch.no_grad():
        loss = evaluation.mean_loss(model, config, all_windows(tokens, 3, 16), Ranks())
    parts = len(list(all_windows(tokens, 3, 16)))
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["calls"][1] == (parts + 1) // 2 and found["calls"][0] == 2 * found["calls"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_ranks_is_the_run_of_one(both, alone, kind):
    """Dropout's masks, evaluations, moving average and samples too; the checkpoint is one process's."""
    folder, _ = both
    result = json.loads((folder / kind / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    ours, theirs = (
        [float(row["loss"]) for row in read_metrics(folder / name / "metrics.csv")] for name in (kind, "alone")
    )
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 3
    for name in (LAST, BEST):
        ours, theirs = load(folder / kind, name), load(folder / "alone", name)
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for state in ("model", "average"):
            assert one_model(*(c[state].values() if state == "model" else c[state] for c in (ours, theirs)))
        assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    assert (folder / kind / "samples.txt").read_text().count("--- step") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_smaller_parts_together(both, kind):
    """One of them runs out of memory with four sequences: both try two, and all steps are those of two from the start."""
    folder, found = both
    assert found[f"short-{kind}"] == [[4, 2] + [2, 2] * 12] * 2
    short, two = (load(folder / f"{name}-{kind}") for name in ("short", "two"))
    assert short["micro"] == 2 and all(same_values(short[name], two[name]) for name in ("model", "optimizer", "step"))


def test_ranks_go_back_together_in_a_later_step(both):
    """Until the exchange of gradients: the step that one could not make is made by both, and no step is lost."""
    folder, found = both
    assert found["short-later"] == [[4] * 5 + [2] + [2, 2] * 9] * 2
    short, two = (load(folder / name)["model"] for name in ("short-later", "two-ddp"))
    assert one_model(short.values(), two.values())


def test_offloading_changes_no_bit(both):
    """On a CPU all is in the host's memory anyway; the way there and back is torch's for every device."""
    assert_same_run(both[0] / "offloaded", both[0] / "fsdp", but=("train.name", "train.offload", "train.parallel"))


def test_an_offloaded_optimizer_is_told_where_its_weights_are(monkeypatch):
    """Loss and norm are on another device than the weights: here a home without numbers stands for the host."""
    config, seen = resolve("tiny", ["n_embd=16", "vocab_size=11"])[0], []
    learner = Learner(config, build_model(config), 8)
    told = learner.optimizer
    monkeypatch.setattr(Learner, "home", torch.device("meta"))
    monkeypatch.setattr(told, "step", lambda: seen.extend((told.found_inf.device, told.grad_scale.device)))
    learner.update(0, torch.ones(()), torch.ones(()))
    assert seen == [torch.device("meta")] * 2 and learner.held_back.device == torch.device("cpu")


def test_offload_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="offload=on is for parallel=fsdp, on several ranks: take that, or recompute"):
        resolve("tiny", ["offload=on"])
    config = resolve("tiny", ["offload=on", "parallel=fsdp"])[0]
    with pytest.raises(ValueError, match="must have several ranks, got one: start it by torchrun, or give offload=off"):
        check_shares(config, Ranks())
    check_shares(config, Ranks(0, 2))


def test_checkpoints_go_from_ranks_to_ranks(both, tmp_path):
    """Made by two ranks that hold parts, gone on with by two that hold all or parts (in the driver), and by one here."""
    folder, _ = both
    ones = [resume(folder / name, ["steps=12"], quiet=True) for name in ("entire", "single")]
    two = json.loads((folder / "parted" / "result.json").read_text())
    assert two["step"] == 12 and [one["val_loss"] for one in ones] == pytest.approx([two["val_loss"]] * 2, rel=1e-5)
    models = [load_model(folder / name, LAST)[0] for name in ("straight", "entire", "single", "parted")]
    for other in models[1:]:
        assert one_model(models[0].parameters(), other.parameters())
    assert not same_weights(load_model(folder / "ddp", LAST)[0], models[0])  # another schedule
    assert_same_run(folder / "halved", folder / "straight")
    # One form of a checkpoint for each case: of those gone on with by ranks that hold all, no part is left.
    parts = {name: sorted(path.name for path in (folder / name).glob("*.[01]")) for name in ("single", "parted")}
    assert parts == {"single": [], "parted": []}


def test_a_killed_rank_ends_all_of_them_and_the_run_goes_on(tmp_path):
    settings = [*small_settings(tmp_path), "name=a", "steps=100000", "eval_every=5", "log_every=1", "eval_batches=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "model", "train", "tiny"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *settings, "schedule=wsd"], stdout=log, stderr=log, env=driver_environment()
        )
        while not (tmp_path / "a" / LAST).exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait(300) != 0
    said = (tmp_path / "log").read_text()
    assert (
        f"go on from the last checkpoint with  torchrun --no-python --nproc-per-node 2 gptkernels train --resume {tmp_path}/a"
        in said
    )
    step = load(tmp_path / "a")["step"]
    assert step % 5 == 0 and resume(tmp_path / "a", [f"steps={step + 5}"], quiet=True)["step"] == step + 5


def test_shares_that_are_not_even_are_refused(settings=("batch=6",)):
    with pytest.raises(
        ValueError, match=r"a multiple of ranks \* micro_batch, got 6 for 4 ranks and micro_batch=auto: 8 is"
    ):
        check_shares(resolve("tiny", settings)[0], Ranks(0, 4))
    with pytest.raises(ValueError, match="parallel=fsdp is for compile=off and dtype=bf16 or fp32"):
        resolve("tiny", ["parallel=fsdp", "compile=on"])


def test_an_exchange_with_a_rank_that_has_ended_is_told_from_other_errors():
    for error in (torch.distributed.DistNetworkError("gone"), RuntimeError("Connection closed by peer [127.0.0.1]:1")):
        assert Ranks(0, 2).lost(error) and not Ranks().lost(error)
    assert not Ranks(0, 2).lost(RuntimeError("loss must be finite"))


def test_a_process_alone_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(torch.device("cpu")) == Ranks() and not torch.distributed.is_initialized()
