"""`bench generate`: every column is there, judged by its logits, and timed token by token."""

import json

import pytest
import torch

from benchmarks import generate as bench
from benchmarks.cli import main
from model.fast import FastGPT

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["generate", "tiny", "--prompt", "5", "--tokens", "3", "--rounds", "1", "--threads", "1"]


def test_the_columns_and_their_figures(capsys):
    assert main(WORDS) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["case"] == "tiny, 5 tokens, then 3, one at a time" and result["machine"]["threads"] == 1
    ours = ["reference", "ours", "ours, keep=False"]
    assert list(result["columns"])[:3] == ours and all(result["columns"][name]["judged"] for name in ours)
    for name, note in result["columns"].items():
        assert note["tokens_per_s"] > 0 and note["first_token_ms"] > 0 and note["error"] < 0.1 * note["largest"]
        assert any(line.startswith(name) for line in lines)


def test_a_model_that_computes_something_else_is_wrong(monkeypatch, capsys):
    real = FastGPT.think
    monkeypatch.setattr(FastGPT, "think", lambda *args: real(*args) * 1.001)
    assert main(WORDS) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and not json.loads(out.splitlines()[-1])["columns"]["ours"]["passed"]


def test_the_first_token_is_timed_apart(monkeypatch):
    """It has the whole prompt to go through."""
    asked = []

    def written(model, prompt, tokens, **_):
        for i in range(tokens):
            asked.append(i)
            yield i

    now = iter([0.0, 5.0, 8.0])
    monkeypatch.setattr(bench, "generate", written)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    assert bench.seconds_of((None, True), torch.arange(3), 4) == (5.0, 1.0) and asked == [0, 1, 2, 3]


@pytest.mark.parametrize("given", [["--prompt", "0"], ["--prompt", "30", "--tokens", "40"], ["--tokens", "1"]])
def test_what_does_not_fit_is_refused(given):
    with pytest.raises(ValueError, match="fit into the context of 16"):
        main(["generate", "tiny", *given])
