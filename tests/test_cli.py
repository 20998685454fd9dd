"""The command line: what each command prints, and the exit status of what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import cli
from model.checkpoint import LAST, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 20)
    words = f"train tiny data={folder}/text.txt out={folder} name=a steps=6 eval_every=3 n_embd=16 --quiet"
    assert cli.main([*words.split(), "threads=1"]) == 0
    return folder / "a"


@pytest.fixture
def call(capsys):
    """(exit status, stdout, stderr) of a command line."""

    def main(*words):
        status = cli.main(list(words))
        return status, *capsys.readouterr()

    return main


def test_sample_is_reproducible(call, run):
    status, text, _ = call("sample", str(run), "To be", "--tokens", "40")
    assert status == 0 and text.startswith("To be") and len(text) == len("To be") + 40 + 1
    assert call("sample", str(run), "To be", "--tokens", "40", "--seed", "0")[1] == text
    assert call("sample", "--tokens", "40", str(run), "--seed", "1", "To be")[1] != text
    assert call("sample", str(run / LAST), "--tokens", "3")[1].startswith("\n")
    status, text, err = call("sample", str(run), "")
    assert status == 2 and text == "" and "the prompt must hold at least one token" in err


def test_sample_needs_not_what_the_run_was_trained_with(call, run, tmp_path):
    """Of a GPU's backend, on a machine without one; an explicit one is honoured."""
    payload = load(run, LAST)
    payload["config"]["train.backend"] = "cuda"
    torch.save(payload, tmp_path / "gpu.pt")
    wanted = call("sample", str(run / LAST), "To be", "--tokens", "5")[1]
    assert call("sample", str(tmp_path / "gpu.pt"), "To be", "--tokens", "5", "--device", "cpu")[1] == wanted
    status, _, err = call("sample", str(run), "To be", "--tokens", "5", "--backend", "cuda", "--device", "cpu")
    assert status == 1 and "backend='cuda'" in err
    status, _, err = call("sample", str(run), "--device", "tpu")
    assert status == 1 and "device must be auto, cpu or cuda, got 'tpu'" in err


def test_a_terminal_may_lack_a_character(tmp_path):
    (tmp_path / "text.txt").write_text("Größe äöü\n" * 30, encoding="utf-8")
    words = [sys.executable, "-m", "model", "data", str(tmp_path / "text.txt")]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0 and b"Gr??e ???" in done.stdout, done.stderr


def test_sample_last_is_the_last_checkpoint(call, run, tmp_path):
    """The best one has other weights here: without --last its likeliest token is written."""
    for name, token in (("last.pt", 2), ("best.pt", 5)):
        payload = load(run, name)
        payload["model"]["transformer.ln_f.weight"].zero_()
        payload["model"]["transformer.ln_f.bias"].copy_(payload["model"]["lm_head.weight"][token] * 100)
        torch.save(payload, tmp_path / name)
    characters = json.loads(payload["tokenizer"])["characters"]
    greedy = ["sample", str(tmp_path), "T", "--tokens", "1", "--temperature", "0"]
    assert call(*greedy)[1] == f"T{characters[5]}\n" and call(*greedy, "--last")[1] == f"T{characters[2]}\n"


def test_resume(call, run):
    status, _, err = call("train", "--resume", str(run))
    assert status == 1 and "has done its 6 steps" in err
    status, out, _ = call("train", "--resume", str(run), "steps=8")
    assert status == 0 and "going on after step 6" in out and "8/8 100%" in out


def test_print_config(call):
    status, out, _ = call("train", "tiny", "lr=1e-2", "--print-config")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and "0.01 " in lines["train.lr"] and "command line" in lines["train.lr"]
    assert "preset tiny" in lines["train.steps"] and "default" in lines["train.clip"]
    assert call("train", "--print-config")[0] == 0


def test_data(call, run):
    status, out, _ = call("data", str(run.parent / "text.txt"))
    assert status == 0 and "size        860 characters, 20 lines" in out and "To be, or not" in out


@pytest.mark.parametrize(
    "words,status,message",
    [
        ("nonsense", 2, "invalid choice: 'nonsense'"),
        ("train", 2, "shakespeare, shakespeare-cpu, tiny), settings, or --resume RUN"),
        ("train nope", 2, "no preset 'nope'"),
        ("train tiny shakespeare-cpu", 2, "train takes one preset"),
        ("train tiny stesp=3", 2, "the nearest is 'steps'"),
        ("train tiny --frobnicate", 2, "unknown option --frobnicate"),
        ("train tiny --resume RUN", 2, "--resume takes the run's own settings"),
        ("train --resume RUN --print-config", 2, "--print-config shows a new run's settings"),
        ("train --resume RUN n_layer=5 steps=99", 1, "model.n_layer must stay 2"),
        ("train --resume nowhere", 1, "RUN must be a run folder to go on with, got nowhere: look under runs/"),
        ("train tiny data=nowhere", 1, "or a file or folder that exists, got 'nowhere'"),
        ("sample", 2, "sample takes RUN and one"),
        ("sample nowhere", 1, "RUN must be a run folder"),
        ("sample RUN a b", 2, "got 3 words"),
        ("sample RUN --tokens 0", 2, "--tokens must be at least 1, got 0"),
        ("sample RUN --tokens many", 2, "invalid int value: 'many'"),
        ("sample RUN --temperature -1", 2, "temperature must be 0"),
        ("sample RUN --seed 18446744073709551616", 2, "--seed must be a whole number of 64 bits"),
        ("sample RUN #", 2, "character '#' is not in the vocabulary"),
        ("data a b", 2, "data takes one source, got 2"),
        ("data nowhere", 1, "or a file or folder that exists, got 'nowhere'"),
        ("doctor now", 2, "doctor takes no 'now'"),
        ("demo now", 2, "demo takes no 'now'"),
    ],
)
def test_what_is_wrong_is_one_line(call, run, words, status, message):
    found, out, err = call(*words.replace("RUN", str(run)).split())
    assert (found, out, err.count("\n")) == (status, "", 1) and message in err


def test_home_is_known_where_no_shell_sees_it(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 40)
    (tmp_path / "own.toml").write_text("[model]\nn_embd = 16\nn_head = 2\ncontext = 8\nn_layer = 1\n")
    settings = ["data=~/text.txt", "out=~/runs", "name=a", "steps=2", "eval_batches=0", "sample_tokens=0", "--quiet"]
    made = ["--tokenizer", "bpe", "--vocab", "270", "--val-fraction", "0.1", "--out=~/tokens"]
    for words in (
        ["train", "~/own.toml", *settings],
        ["train", "--resume", "~/runs/a", "steps=3", "--quiet"],
        ["sample", "~/runs/a", "--tokens", "2"],
        ["sample", "~/runs/a/last.pt", "--tokens", "2"],
        ["check", "~/runs/a", "--steps", "1", "--band", "2", "--report", "~/page.html"],
        ["convert", "~/runs/a", "~/w.safetensors"],
        ["convert", "~/w.safetensors", "hf:~/gpt2"],
        ["data", "~/text.txt", *made],
        ["data", "~/tokens"],
    ):
        assert call(*words)[0] == 0, words
    assert not (tmp_path / "~").exists()
    assert all(
        (tmp_path / name).exists() for name in ("runs/a/last.pt", "page.html", "w.safetensors", "gpt2", "tokens")
    )


def test_help_names_the_commands(call):
    status, out, _ = call("--help")
    assert status == 0 and all(name in out for name in ("train", "sample", "data", "check", "bench", "doctor", "demo"))
    for name in ("train", "sample", "data", "check", "doctor"):
        assert call(name, "--help")[0] == 0
    assert call()[0] == 2


def test_debug_shows_where(call):
    status, _, err = call("sample", "nowhere", "--debug")
    assert status == 1 and "Traceback" in err and err.endswith("look under runs/\n")


@pytest.mark.parametrize("error,status", [(KeyboardInterrupt, 130), (RuntimeError("no"), 1), (OSError("disk"), 1)])
def test_statuses(call, monkeypatch, error, status):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "data_command", fail)
    assert call("data")[0] == status


def test_the_program_and_a_reader_that_leaves(run):
    """The installed program: a pipe whose reader has gone ends it quietly."""
    program = Path(sys.executable).with_name("gptkernels")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "model"]
    process = subprocess.Popen(
        [*command, "sample", str(run), "--tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert len(os.read(process.stdout.fileno(), 10)) > 0
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (141, b"")
