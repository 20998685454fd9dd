"""Training: exact resume, the guards, the schedule, the files and the lines of a run."""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from training_case import TEXT, assert_same_run, chosen, rows_of, small_settings

from model import optimize
from model import train as training
from model.checkpoint import BEST, LAST, build_model, load
from model.config import resolve
from model.data import load_dataset
from model.evaluate import evaluate
from model.interrupt import interruptible
from model.machine import commit
from model.run_files import read_metrics
from model.train import resume, train
from model.weights_file import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"config.toml", "env.json", "metrics.csv", "metrics.jsonl", "samples.txt", "loss.svg", "report.html", "model.safetensors",
         "result.json", LAST, BEST}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """A small run that looks at itself often."""
    warmup = f"warmup={resolve('tiny')[0].train.warmup}"
    more = ["batch=4", "eval_batches=2", "eval_every=4", "log_every=1", "sample_tokens=20", warmup]
    return [*small_settings(tmp_path), *more]


@pytest.fixture
def text(settings, tmp_path):
    return tmp_path / "text.txt"


def interrupt_at(monkeypatch, step):
    """Press Ctrl-C in the middle of a step, from 0."""
    real = optimize.learning_rate

    def press(now, settings):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(now, settings)

    monkeypatch.setattr(optimize, "learning_rate", press)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["dropout=0.2"],
        ["model=reference", "dropout=0.2"],
        ["backend=reference"],
        ["dtype=bf16"],
        ["backend=cpu,layer_norm:reference"],
    ],
    ids=str,
)
def test_resume_is_exact(settings, tmp_path, monkeypatch, more):
    """Stopped after step 6, between two evaluations: weights, optimizer, random state, metrics and samples are equal."""
    straight = train(chosen(settings, *more, "name=straight"), quiet=True)
    interrupt_at(monkeypatch, 5)
    stopped = train(chosen(settings, *more, "name=stopped"), quiet=True)
    monkeypatch.undo()
    assert stopped["interrupted"] and stopped["step"] == 6 and load(tmp_path / "stopped")["step"] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(99)  # as a new process would have another state
    resumed = resume(tmp_path / "stopped", quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert resumed["val_loss"] == straight["val_loss"] and not resumed["interrupted"]


def test_resume_in_another_process_is_exact(settings, tmp_path):
    """The same through the program, with a real SIGINT from outside at whatever step it meets."""
    overrides = [*settings, "steps=300", "eval_every=150", "dropout=0.1"]
    train(chosen(overrides, "name=straight"), quiet=True)
    # Beyond step 50 the steps are slow: a busy machine that notices step 15 late still has ten seconds for its signal.
    code = """if True:
        import sys, time
        import model.train as training
        from model.cli import main
        real = training.timed_step
        training.timed_step = lambda state: (time.sleep(0.04 * (state.step > 50)), real(state))[1]
        sys.exit(main())"""
    command = [sys.executable, "-c", code, "train", "tiny", *overrides, "name=stopped"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 15/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    step = load(tmp_path / "stopped")["step"]
    assert process.returncode == 130 and 15 <= step < 300
    assert f"stopped after step {step}, saved: go on with  gptkernels train --resume {tmp_path}/stopped" in out
    assert "stopping after this step; Ctrl-C again stops at once" in err and "Traceback" not in err
    resume(tmp_path / "stopped", quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_stops_at_once(first):
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interrupt:
        os.kill(os.getpid(), first)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_in_a_thread_takes_no_signals(settings, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(chosen(settings, "name=t"), quiet=True)))
    thread.start()
    thread.join()
    assert results[0]["step"] == 12


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(settings, tmp_path, monkeypatch):
    """Rows beyond the checkpoint are written anew, a torn last line is dropped."""
    train(chosen(settings, "name=straight"), quiet=True)
    real = training.timed_step

    def crash(state):
        if state.step == 6:
            raise MemoryError
        return real(state)

    monkeypatch.setattr(training, "timed_step", crash)
    with pytest.raises(MemoryError):
        train(chosen(settings, "name=killed"), quiet=True)
    monkeypatch.undo()
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("7,1.2")
    assert load(tmp_path / "killed")["step"] == 4
    resume(tmp_path / "killed", quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_what_resume_refuses(settings, tmp_path, text):
    train(chosen(settings, "name=a"), quiet=True)
    folder = tmp_path / "a"
    with pytest.raises(ValueError, match="has done its 12 steps: give steps= a larger number"):
        resume(folder, quiet=True)
    for override in ("n_layer=3", "out=elsewhere", "name=b", "val_fraction=0.2"):
        with pytest.raises(ValueError, match=r"must stay .* in a resumed run"):
            resume(folder, ["steps=20", override], quiet=True)
    with pytest.raises(ValueError, match="got the file"):
        resume(folder / LAST, ["steps=20"], quiet=True)
    with pytest.raises(ValueError, match=r"must be a run folder to go on with, got .*nowhere: look under runs/"):
        resume(tmp_path / "nowhere", quiet=True)
    written = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(written.replace("n_embd = 16", "n_embd = 32"))
    with pytest.raises(
        ValueError, match=r"config\.toml says model\.n_embd = 32, but the run was made with 16: restore it"
    ):
        resume(folder, ["steps=20"], quiet=True)
    (folder / "config.toml").write_text(written)
    text.write_text(text.read_text() + "§")
    with pytest.raises(ValueError, match="the text must be the one that the run began with"):
        resume(folder, ["steps=20"], quiet=True)
    with pytest.raises(ValueError, match=r"holds a run: resume it with `train --resume"):
        train(chosen(settings, "name=a"), quiet=True)


def test_more_steps_and_moved_data(settings, tmp_path, text):
    train(chosen(settings, "name=a"), quiet=True)
    moved = text.rename(tmp_path / "moved.txt")
    result = resume(tmp_path / "a", ["steps=16", f"data={moved}"], quiet=True)
    assert result["step"] == 16 and [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.csv")][-1] == "16"


def test_the_files_of_a_run(settings, tmp_path):
    result = train(chosen(settings, "name=a"), quiet=True)
    folder = tmp_path / "a"
    assert {path.name for path in folder.iterdir()} == FILES
    # The resolved settings, with the vocabulary that the data gave.
    assert resolve(str(folder / "config.toml"))[0].model.vocab_size == len(set(TEXT))
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["val_loss"]] == ["4", "8", "12"]
    assert float(rows[-1]["val_loss"]) == pytest.approx(result["val_loss"], rel=1e-5)
    steps, seconds, losses = zip(*result["evaluations"], strict=True)
    assert [(str(step), f"{loss:.6g}") for step, loss in zip(steps, losses, strict=True)] == [
        (row["step"], row["val_loss"]) for row in rows if row["val_loss"]
    ]
    assert 0 < seconds[0] < seconds[-1] == result["train_seconds"]
    env = json.loads((folder / "env.json").read_text())
    assert env["torch"] == torch.__version__ and env["data_sha256"] == result["data_sha256"]
    assert env["backends"].keys() >= {"causal_attention", "layer_norm", "linear", "gelu_mlp", "linear_cross_entropy"}
    written = json.loads((folder / "result.json").read_text())
    assert written["val_loss"] == result["val_loss"] and written["machine"] == env
    assert written["machine"]["commit"][:40] == commit()[:40] and written["machine"]["date"].endswith("+00:00")
    assert (folder / "samples.txt").read_text().count("--- step ") == 3
    svg = ElementTree.parse(folder / "loss.svg").getroot()
    lines = [e.get("points").split() for e in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [12, 3]


def test_training_learns(settings):
    result = train(chosen(settings, "steps=60", "eval_every=60", "lr=1e-2"), quiet=True)
    assert result["val_loss"] < 2.6 < math.log(len(set(TEXT)))


def test_the_fast_model_trains_as_the_reference_does(settings, tmp_path):
    for kind in ("fast", "reference"):
        train(chosen(settings, "dropout=0.1", f"model={kind}", f"name={kind}"), quiet=True)
    pairs = zip(rows_of(tmp_path / "fast"), rows_of(tmp_path / "reference"), strict=True)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs) < 2e-5


def test_what_a_resume_changes_outlives_a_kill(settings, tmp_path, monkeypatch, capsys):
    train(chosen(settings, "name=a"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(training, "timed_step", lambda state: 1 / 0)  # before any step, as by a kill
        with pytest.raises(ZeroDivisionError):
            resume(tmp_path / "a", ["steps=20", "lr=1e-5", "min_lr=1e-5"], quiet=True)
    path = tmp_path / "a" / "config.toml"
    path.write_text(path.read_text().replace("weight_decay = 0.1", "weight_decay = 0.3"))
    result = resume(tmp_path / "a")
    assert result["step"] == 20
    assert "weight_decay = 0.3, the run has 0.1 and keeps it: give it after --resume RUN" in capsys.readouterr().out
    config = load(tmp_path / "a", LAST)["config"]
    assert config["train.lr"] == 1e-5 and config["train.weight_decay"] == 0.1


def test_a_micro_batch_of_auto_is_chosen_anew_after_a_number(settings, tmp_path):
    train(chosen(settings, "name=a", "micro_batch=2"), quiet=True)
    assert resume(tmp_path / "a", ["steps=16", "micro_batch=auto"], quiet=True)["step"] == 16
    assert load(tmp_path / "a", LAST)["micro"] == 4


def test_evaluation_is_the_whole_part_without_dropout(settings, text):
    config = chosen(settings, "dropout=0.5", "vocab_size=40")
    dataset = load_dataset(str(text), 0.1, 16)
    model = build_model(config).train()
    figures = evaluate(model, dataset, config, step=4)
    assert figures == evaluate(model, dataset, config, step=4) and model.training
    model.eval()
    tokens, total, count = dataset.val, 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        x, y = tokens[start : start + 16][: len(tokens) - 1 - start], tokens[start + 1 : start + 17]
        logits = model(x[None])[0][0].detach().double()
        total, count = total + F.cross_entropy(logits, y, reduction="sum").item(), count + len(y)
    assert count == len(tokens) - 1 and figures["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(total / count / math.log(2), rel=1e-5)  # a byte a character
    assert figures["val_loss_random"] != evaluate(model, dataset, config, step=8)["val_loss_random"]


@pytest.mark.parametrize("override,error,message", [
    ("device=cuda", RuntimeError, "device=cuda needs a GPU"),
    ("device=tpu", ValueError, "device must be auto, cpu or cuda, got 'tpu'"),
    ("vocab_size=3", ValueError, "vocab_size must be at least the data's"),
    ("context=4000", ValueError, "must hold at least 4002 tokens"),
    ("backend=cuda", RuntimeError, "backend='cuda'"),
])  # fmt: skip
def test_wrong_settings_leave_no_folder(settings, tmp_path, override, error, message):
    if "cuda" in override and torch.cuda.is_available():
        override, message = override.replace("cuda", "cuda:99"), ""
        error = (RuntimeError, ValueError)
    with pytest.raises(error, match=message):
        train(chosen(settings, f"out={tmp_path}/new", override), quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_of_another_text_is_refused(settings, tmp_path):
    """As with a preset of GPT-2's and no data=: its table has 50304 rows, the text some 30 characters."""
    with pytest.raises(
        ValueError, match=r"vocab_size must be the data's \d+ tokens, or fewer than 128 more rows, got 50304: name"
    ):
        train(chosen(settings, "vocab_size=50304", "name=a"), quiet=True)
    assert not (tmp_path / "a").exists()
    assert train(chosen(settings, "vocab_size=64", "name=a", "steps=2"), quiet=True)["step"] == 2
    model, config = load_weights(tmp_path / "a" / "model.safetensors", [])  # which says what it computes
    assert len(model.lm_head.weight) == config.model.vocab_size < 64


def test_exported_weights_are_the_best_also_after_an_interrupt(settings, tmp_path, monkeypatch):
    for steps, interrupt in ((4, None), (12, 9)):
        if interrupt:
            interrupt_at(monkeypatch, interrupt)
            assert resume(tmp_path / "a", [f"steps={steps}"], quiet=True)["interrupted"]
        else:
            train(chosen(settings, "name=a", f"steps={steps}"), quiet=True)
        model, _ = load_weights(tmp_path / "a" / "model.safetensors", [])
        best = load(tmp_path / "a", BEST)
        assert best["step"] == (8 if interrupt else 4)
        assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, best["model"]["transformer.h.0.mlp.c_fc.weight"])


def test_folders_that_cannot_be(settings, tmp_path, text):
    with pytest.raises(RuntimeError, match=r"cannot make the run folder .*: Not a directory: choose another out="):
        train(chosen(settings, f"out={text}"), quiet=True)
    with pytest.raises(RuntimeError, match="must be a folder, but a file is there"):
        train(chosen(settings, f"name={text.name}"), quiet=True)


def test_quiet_says_nothing(settings, capsys):
    train(chosen(settings), quiet=True)
    assert capsys.readouterr().out == ""


def test_the_cards_say_what_matters(settings, tmp_path, capsys):
    result = train(chosen(settings, "name=a"))
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in build_model(resolve(str(tmp_path / "a" / "config.toml"))[0]).parameters())
    for part in (f"parameters  {parameters:,}", "4 x 16 = 64 tokens", "FLOPs a token", "memory  about", "1 thread\n",
                 "backends  ", "linear_cross_entropy", result["data_sha256"][:12], "seed  1337", "12/12 100% | loss",
                 "| gnorm", "iB | eta", f"best {result['best_val_loss']:.4f}", "peak memory", result["sample"],
                 f"gptkernels sample {tmp_path}/a 'the quick", "bits a byte", "ms a step"):  # fmt: skip
        assert part in out, part


def test_times_leave_the_first_steps_out():
    assert training.recent_ms([9.0] * 10) is None
    assert training.recent_ms([9.0] * 10 + [1.0, 2.0, 3.0]) == statistics.median([1.0, 2.0, 3.0])
