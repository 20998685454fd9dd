"""`check`: the rule by itself, the fast model passes, and a planted fault of every kind makes it fail."""

import json
import math

import pytest
import torch

from model import cli, equivalence, fast
from model.config import resolve
from model.equivalence_report import table
from model.equivalence_rule import Row, allowed_error, compare, pooled
from model.train import train

QUICK = ["tiny", "n_layer=1", "n_embd=16", "batch=4", "--steps", "3"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Threads for such small models only wait for each other."""
    torch.set_num_threads(1)


def check(capsys, *arguments):
    """(exit status, the JSON of the last line, all lines)."""
    status = cli.main(["check", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return status, json.loads(lines[-1]) if lines else None, lines


def test_the_fast_model_passes(capsys):
    status, result, lines = check(capsys, "tiny", "--steps", "5")
    assert status == 0 and result["passed"] is True and all(row["passed"] for row in result["rows"])
    names = [row["quantity"] for row in result["rows"]]
    assert names[:2] == ["logits", "loss"] and names[-1] == "losses of 5 steps" and len(names) == len(set(names))
    gradients = {
        f"grad {name}" for name, _ in equivalence.GPT(resolve("tiny", ["vocab_size=5"])[0].model).named_parameters()
    }
    assert set(names[2:-1]) == gradients
    # float32 errs: rows of zeros would mean that nothing was compared.
    assert all(row["reference_error"] > 0 and row["magnitude"] > 0 for row in result["rows"])
    assert "The fast model computes the reference's function: all 31 quantities" in "\n".join(lines)


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "bf16"], ["--backend", "reference"], ["--backend", "reference", "--dtype", "bf16"], ["dropout=0.3"],
     ["act=gelu"], ["tie=off"], ["pos=sinusoidal"], ["bias=off"], ["--seed", "3"]],
    ids=" ".join,
)  # fmt: skip
def test_every_variant_passes(capsys, arguments):
    status, result, _ = check(capsys, *QUICK, *arguments)
    assert status == 0, [row for row in result["rows"] if not row["passed"]]


def fault(name):
    """A fast model's operator with one thing wrong: a function over the right one."""

    def with_eps(right):
        return lambda *args, **kwargs: right(*args, eps=1.2e-5, **kwargs)

    def without_bias(right):
        return lambda x, w, bias=None, **kwargs: right(x, w, None, **kwargs)

    def other_gelu(right):
        return lambda *args, approximate, **kwargs: right(*args, approximate="none", **kwargs)

    def other_scale(right):
        return lambda qkv, **kwargs: right(qkv, scale=qkv.shape[-1] ** -0.5 * 1.001, **kwargs)

    def no_gradient(right):
        return lambda x, w, *args, **kwargs: right(x, w.detach(), *args, **kwargs)

    def nan(right):
        return lambda *args, **kwargs: right(*args, **kwargs) * math.nan

    def other_mask(right):
        return lambda *args, seed=None, **kwargs: right(*args, seed=seed and seed + 1, **kwargs)

    return locals()[name]


@pytest.mark.parametrize(
    "operator,name,more",
    [
        ("layer_norm", "with_eps", []),
        ("linear", "without_bias", []),
        ("gelu_mlp", "other_gelu", []),
        ("causal_attention_packed", "other_scale", []),
        ("causal_attention_packed", "nan", []),
        ("causal_attention_packed", "other_mask", ["dropout=0.3"]),
        ("linear_cross_entropy", "no_gradient", ["tie=off"]),
    ],
)
def test_a_planted_fault_fails(capsys, monkeypatch, operator, name, more):
    monkeypatch.setattr(fast, operator, fault(name)(getattr(fast, operator)))
    status, result, lines = check(capsys, *QUICK, *more)
    assert status == 1 and result["passed"] is False
    assert any(line.startswith("FAILED: the fast model is not the reference's function") for line in lines)
    assert any(line.endswith("FAILED") for line in lines)


def test_a_fault_in_the_backward_alone_fails_in_gradients_and_training(capsys, monkeypatch):
    right = fast.linear_cross_entropy

    def wrong(x, *args, **kwargs):
        return right(x * 0.99 + 0.01 * x.detach(), *args, **kwargs)  # the value of x, 0.99 of its gradient

    monkeypatch.setattr(fast, "linear_cross_entropy", wrong)
    _, result, _ = check(capsys, *QUICK)
    passed = {row["quantity"]: row["passed"] for row in result["rows"]}
    assert passed["logits"] and passed["loss"] and not passed["losses of 3 steps"]
    assert not passed["grad transformer.h.0.mlp.c_fc.weight"] and not passed["grad transformer.wpe.weight"]


def test_a_run_is_checked_on_its_own_weights(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 100)
    config, _ = resolve("tiny", [f"data={text}", f"out={tmp_path}", "name=a", "steps=5", "n_embd=16"])
    train(config, quiet=True)
    status, result, lines = check(capsys, str(tmp_path / "a"), "--steps", "2")
    assert result["name"] == str(tmp_path / "a") and f"trained weights, text: {text}" in lines[0]
    # Whether so small a model passes is not what is asked here, only that the status says what the rows say.
    assert status == (0 if all(row["passed"] for row in result["rows"]) else 1) and result["passed"] == (status == 0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nope"], "no preset 'nope'"),
        (["tiny", "shakespeare-cpu"], "one preset or run, got tiny and shakespeare-cpu"),
        (["tiny", "--steps", "-1"], "--steps must not be negative"),
        (["tiny", "--backend", "magic"], "backend must be auto or one of"),
        (["tiny", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["tiny", "--frobnicate"], "unknown option --frobnicate"),
        (["tiny", "lr=x"], "train.lr must be a number"),
    ],
)
def test_what_cannot_be_checked_is_status_2(capsys, arguments, message):
    assert cli.main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1


def test_the_rule():
    assert allowed_error(3.0, 0.0, torch.float32) == 6.0
    assert allowed_error(0.0, 2.0, torch.float32) == 2 * torch.finfo(torch.float32).eps
    oracle = torch.tensor([1.0, -4.0], dtype=torch.float64)
    ours, plain = oracle + torch.tensor([0.0, 0.3]), oracle - torch.tensor([0.2, 0.0])
    row = compare("x", ours, plain, oracle, dtype=torch.float32)
    assert (row.error, row.reference_error, row.magnitude) == pytest.approx((0.3, 0.2, 4.0)) and row.passed
    assert not compare("x", oracle + 0.5, plain, oracle, dtype=torch.float32).passed
    for broken in (
        (ours * math.nan, plain, oracle),
        (ours, plain * math.nan, oracle),
        (ours, plain, oracle * math.nan),
    ):
        assert not compare("x", *broken, dtype=torch.float32).passed
    with pytest.raises(ValueError, match="x: shapes"):
        compare("x", ours[:1], plain, oracle, dtype=torch.float32)


def test_pooling_takes_the_largest_and_keeps_nan():
    def row(error):
        return Row("x", error, 1.0, 0.0, 2.0)

    assert pooled([row(1.5), row(1.9)], torch.float32).passed
    assert not pooled([row(1.5), row(2.1)], torch.float32).passed
    assert not pooled([row(1.5), row(math.nan), row(0.1)], torch.float32).passed


def test_the_table_shows_every_failure_and_json_knows_no_nan():
    rows = [Row(f"grad {i}", 0.1, 1.0, 1.0, 2.0) for i in range(20)] + [Row("grad bad", math.nan, 1.0, 1.0, 2.0)]
    text = table(rows)
    assert "grad bad" in text and "and 12 more gradients" in text and "more" not in table(rows, show_all=True)
    assert rows[-1].figures()["error"] is None
