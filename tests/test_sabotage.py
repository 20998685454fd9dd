"""check catches known bugs, bisect names their place, and a bug that escapes fails the command."""

import json

import pytest
import torch

from model import cli, equivalence_sabotage
from model.equivalence_bisect import bisect
from model.equivalence_faults import FAULTS, Fault
from model.equivalence_sites import forward_sites
from model.equivalence_subject import subject

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["n_layer=2", "n_embd=16", "batch=4"]
BY_NAME = {fault.name: fault for fault in FAULTS}


def check(capsys, *arguments):
    """(exit status, the JSON of the last line, all lines)."""
    status = cli.main(["check", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return status, json.loads(lines[-1]), lines


def test_every_planted_bug_is_caught_and_placed(capsys):
    status, result, lines = check(capsys, "--sabotage")
    assert status == 0 and result["passed"]
    assert [one["fault"] for one in result["sabotage"]] == ["nothing", *BY_NAME]
    assert [one["verdict"] for one in result["sabotage"]] == ["passes"] + ["caught"] * len(FAULTS)
    assert all(one["bisected"] == one["place"] for one in result["sabotage"][1:])
    levels = {one["fault"]: set(one["levels"]) for one in result["sabotage"]}
    # A backward that lacks a term leaves the values alone.
    for name in ("gradient of softmax without the row sum", "gradient of the norm without its mean terms"):
        assert "gradient" in levels[name] and not levels[name] & {"logits", "loss"}
    assert any("fails each of the 17 planted bugs" in line for line in lines)


def test_a_bug_that_escapes_fails_the_command(capsys, monkeypatch):
    harmless = Fault("nothing wrong at all", "mlp", lambda operator: operator)
    monkeypatch.setattr(equivalence_sabotage, "FAULTS", (harmless,))
    status, result, lines = check(capsys, "--sabotage")
    assert status == 1 and not result["passed"] and result["sabotage"][1]["verdict"] == "ESCAPED"
    assert "FAILED: check does not tell right from wrong: nothing wrong at all." in lines


def test_a_bug_that_is_there_all_along_is_a_false_alarm(capsys, monkeypatch):
    fault = BY_NAME["variance over C - 1"]
    monkeypatch.setattr(equivalence_sabotage, "FAULTS", ())
    monkeypatch.setattr(equivalence_sabotage, "as_it_is", fault.planted())
    status, result, _ = check(capsys, "--sabotage")
    assert status == 1 and result["sabotage"][0]["verdict"] == "FALSE ALARM"


def test_bisect_names_the_step_too():
    """A stale seed is right in the first step."""
    what = subject("tiny", [*SMALL, "dropout=0.1"], seed=0)
    fault = BY_NAME["stale dropout seed"]
    found = bisect(what, 4, backend="auto", dtype=torch.float32, seed=0, choose=fault.planted())
    assert found.step == 1 and found.site.name == "h.1.attn" and found.site.layer == 1
    by_swap = {swap.what: swap.worst.passed for swap in found.swaps}
    assert by_swap["only h.1.attn (causal_attention_packed)"] and by_swap["layer 1"]
    assert by_swap["every causal_attention_packed"]
    assert not by_swap["nothing"] and not by_swap["layer 0"] and not by_swap["every linear"]
    assert "step 2, layer 1, operator causal_attention_packed at h.1.attn" in found.sentence()
    assert "in that one place the model passes" in found.sentence()


def test_bisect_finds_the_first_of_two_faults_and_says_that_there_is_another():
    what = subject("tiny", SMALL, seed=0)
    early, late = BY_NAME["scores not scaled by 1/sqrt(D)"].planted(), BY_NAME["variance over C - 1"].planted()
    found = bisect(
        what,
        2,
        backend="auto",
        dtype=torch.float32,
        seed=0,
        choose=lambda site, operator: late(site, early(site, operator)),
        every_swap=False,
    )
    assert found.step == 0 and found.site.name == "h.1.attn" and "there is another fault" in found.sentence()


def test_bisect_on_the_command_line(capsys):
    status, result, lines = check(capsys, "tiny", *SMALL, "--steps", "2", "--band", "2", "--bisect")
    assert status == 0 and result["bisect"]["step"] is None and result["bisect"]["site"] is None
    assert any(line.startswith("Bisect: in none of 2 steps") for line in lines)
    assert result["bisect"]["swaps"][0]["swapped"] == "nothing"


def test_the_sites_are_the_calls_of_a_forward():
    names = [site.name for site in forward_sites(subject("tiny", SMALL, seed=0).config.model)]
    assert names[:6] == ["h.0.ln_1", "h.0.attn.c_attn", "h.0.attn", "h.0.attn.c_proj", "h.0.ln_2", "h.0.mlp"]
    assert names[-3:] == ["ln_f", "lm_head", "loss"] and len(names) == 15


@pytest.mark.parametrize(
    "words", [["tiny"], ["--bisect"], ["--dtype", "bf16"], ["--steps", "3"], ["--report", "x.html"]]
)
def test_sabotage_goes_alone(capsys, words):
    assert cli.main(["check", "--sabotage", *words]) == 2
    assert "--sabotage has its own model" in capsys.readouterr().err
