"""`check`: the rule by itself, the fast model passes, and a planted fault of every kind makes it fail."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from model import cli, equivalence_subject, fast
from model.backends import OPERATORS
from model.config import resolve
from model.equivalence_report import table
from model.equivalence_rule import LEVELS, Row, allowed_error, compare, last_place, nearest, pooled
from model.equivalence_run import compare_all
from model.equivalence_sites import forward_sites
from model.equivalence_subject import subject
from model.progress import Whereabouts
from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["tiny", "n_layer=1", "n_embd=16", "batch=4", "--steps", "3", "--band", "2"]


def check(capsys, *arguments):
    """(exit status, the JSON of the last line, all lines)."""
    status = cli.main(["check", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return status, json.loads(lines[-1]) if lines else None, lines


def test_the_fast_model_passes(capsys):
    status, result, lines = check(capsys, "tiny", "--steps", "5", "--band", "3")
    assert status == 0 and result["passed"] is True and all(row["passed"] for row in result["rows"])
    assert list(dict.fromkeys(row["level"] for row in result["rows"])) == list(LEVELS)
    names = {level: [row["quantity"] for row in result["rows"] if row["level"] == level] for level in LEVELS}
    assert names["training"] == ["losses of 5 steps"] and names["tokens"] == ["48 greedy tokens"]
    model = equivalence_subject.GPT(resolve("tiny", ["vocab_size=5"])[0].model)
    assert set(names["gradient"]) == {f"grad {name}" for name, _ in model.named_parameters()}
    assert len(names["block"]) == 4
    assert {name.partition(":")[0] for name in names["operator"]} == {
        f"{site.name} {site.operator}" for site in forward_sites(model.config)
    }
    # float32 errs: rows of zeros would mean that nothing was compared.
    compared = [row for row in result["rows"] if row["level"] != "tokens"]
    assert all(row["reference_error"] > 0 and row["magnitude"] > 0 and row["reference_rms"] > 0 for row in compared)
    assert all(row["repeats"] is True for row in result["rows"])
    assert len(result["band"]["ours"]) == 5 and len(result["band"]["nudged"]) == 3
    text = "\n".join(lines)
    assert f"computes the reference's function: all {len(result['rows'])} quantities" in text
    assert "Is this drift normal? Yes: over 5 steps" in text


def test_backends_by_operator(capsys):
    """Every operator is compared on the backend asked for it: on the reference it errs exactly as plain PyTorch does."""
    status, result, lines = check(capsys, *QUICK, "--backend", "cpu,layer_norm:reference")
    assert status == 0 and "backend cpu,layer_norm:reference: cpu (" in "\n".join(lines)
    rows = [row for row in result["rows"] if row["level"] == "operator"]
    plain = {name: all(row["error"] == row["reference_error"] and row["rms"] == row["reference_rms"] for row in rows
                       if f" {name}" in row["quantity"]) for name in OPERATORS}  # fmt: skip
    assert plain == {name: name == "layer_norm" for name in OPERATORS}


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
    assert passed["logits"] and passed["loss"] and passed["block 0 output"] and not passed["losses of 3 steps"]
    assert passed["loss linear_cross_entropy: output"] and not passed["loss linear_cross_entropy: grad of x"]
    assert not passed["weights after one step"]
    assert not passed["grad transformer.h.0.mlp.c_fc.weight"] and not passed["grad transformer.wpe.weight"]


def test_a_run_is_checked_on_its_own_weights(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 100)
    config, _ = resolve("tiny", [f"data={text}", f"out={tmp_path}", "name=a", "steps=5", "n_embd=16", "backend=cpu"])
    train(config, quiet=True)
    status, result, lines = check(capsys, str(tmp_path / "a"), "--steps", "2")
    assert result["name"] == str(tmp_path / "a") and f"trained weights, text: {text}" in lines[0]
    assert lines[2] == "its configuration trains with backend=cpu: --backend cpu compares that one"
    assert status == 0 and result["passed"], [row for row in result["rows"] if not row["passed"]]
    text.rename(tmp_path / "moved.txt")
    assert cli.main(["check", str(tmp_path / "a"), "--steps", "0"]) == 2
    assert "that exists, got" in capsys.readouterr().err
    _, result, lines = check(capsys, str(tmp_path / "a"), f"data={tmp_path}/moved.txt", "--steps", "0")
    assert result["passed"] and f"text: {tmp_path}/moved.txt" in lines[0]


def test_a_padded_table_is_checked_on_its_words(capsys):
    status, result, _ = check(capsys, "tiny", "vocab_size=128", "words=100", "--steps", "0")
    assert status == 0 and result["passed"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nope"], "no preset 'nope'"),
        (["runs/nope"], "runs/nope is no run and no state_dict file: there is no such file or folder"),
        (["tests/"], "tests/ is no run and no state_dict file: it has neither last.pt nor best.pt"),
        (["tiny", "shakespeare-cpu"], "one preset, run or file, got tiny and shakespeare-cpu"),
        (["tiny", "--steps", "-1"], "--steps must not be negative"),
        (["tiny", "--report", "page.pdf"], "--report must end in .html, got page.pdf"),
        (["tiny", "--band", "0"], "--band must be at least 1"),
        (["tiny", "backend=simt"], "backend=simt: check takes it as --backend"),
        (["tiny", "train.dtype=bf16"], "train.dtype=bf16: check takes it as --dtype"),
        (["tiny", "model=reference"], "model=reference: check compares both models, on the CPU"),
        (["tiny", "--backend", "magic"], "backend must be one of auto"),
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
    rows = [Row(f"grad {i}", 0.1, 1.0, 1.0, 2.0, "gradient") for i in range(20)]
    rows.append(Row("grad bad", math.nan, 1.0, 1.0, 2.0, "gradient"))
    text = table(rows)
    assert "grad bad" in text and "and 15 more" in text and "more" not in table(rows, show_all=True)
    assert rows[-1].figures()["error"] is None


def test_a_second_run_with_other_bits_fails():
    oracle = torch.tensor([1.0, -4.0], dtype=torch.float64)
    ours = oracle.float()
    assert compare("x", ours, ours, oracle, dtype=torch.float32, again=ours.clone()).passed
    row = compare("x", ours, ours, oracle, dtype=torch.float32, again=ours + 1e-6)
    assert row.repeats is False and not row.passed and row.error <= row.allowed
    assert pooled([row, row], torch.float32).repeats is False


def test_units_in_the_last_place():
    x = torch.tensor([1.0, 1.5, 2.0, 0.75, -3.0, 0.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        for value, place in zip(x[:-1].tolist(), last_place(x, dtype)[:-1].tolist(), strict=True):
            value = torch.tensor(abs(value), dtype=dtype)
            assert place == float(torch.nextafter(value, value * 2)) - float(value)
    assert compare("x", (x + 3 * last_place(x, torch.float32)).float(), x, x, dtype=torch.float32).ulp == 3.0


def test_elements_may_have_limits_of_their_own():
    exact = torch.zeros(2, dtype=torch.float64)
    limits = torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert (
        compare("x", exact + torch.tensor([0.5, 0.005]), exact, exact, dtype=torch.float32, allowed=limits).share == 0.5
    )
    row = compare("x", exact + torch.tensor([0.5, 0.02]), exact, exact, dtype=torch.float32, allowed=limits)
    assert row.share == pytest.approx(2.0) and not row.passed and row.error == 0.5
    assert compare("x", exact, exact, exact, dtype=torch.float32, allowed=limits).passed
    assert not compare("x", exact * math.nan, exact, exact, dtype=torch.float32, allowed=limits).passed


def test_parts_with_limits_of_their_own_are_judged_by_the_nearest():
    """A large error within its limit hides no small one beyond its own."""
    rows = [Row("w", 1.0, 1.0, 8.0, 4.0, repeats=True), Row("w", 0.1, 0.2, 9.0, 0.05, repeats=True)]
    both = nearest(rows)
    assert not both.passed and both.share == pytest.approx(2.0)
    assert (both.error, both.reference_error, both.magnitude, both.repeats) == (1.0, 1.0, 9.0, True)
    assert nearest(rows[:1]) == rows[0]
    assert not nearest([rows[0], replace(rows[0], error=math.nan)]).passed
    assert not nearest([rows[0], replace(rows[0], error=0.0, allowed=math.nan)]).passed
    assert nearest([rows[0], replace(rows[0], repeats=False)]).repeats is False


def test_a_long_check_says_where_it_is(capsys):
    """On stderr, apart from the table and the JSON; a quick one says nothing."""
    what = subject("tiny", [], seed=0)
    settings = {"steps": 2, "backend": "auto", "dtype": torch.float32, "seed": 0, "runs": 2, "tokens": 2}
    compare_all(what, **settings, say=Whereabouts(0.0))
    lines = [line.partition(" s: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[:4] == ["operators", "blocks", "logits, loss and gradients", "one optimizer step"]
    runs = ["ours", "ours", "plain PyTorch", "float64", "nudged weights, 1 of 2", "nudged weights, 2 of 2"]
    assert lines[4:] == [*(f"training of 2 steps: {run}" for run in runs), "greedy text"]
    compare_all(what, **settings, say=Whereabouts(3600.0))
    assert capsys.readouterr().err == ""


def test_a_changed_model_is_told_where_its_calls_are_listed(monkeypatch, capsys):
    """As with an attention of plain PyTorch in the place of the operator."""

    def attend(self, attn, h, layer, seed):
        B, T, C = h.shape
        qkv = fast.linear(h, attn.c_attn.weight, attn.c_attn.bias).view(B, T, 3, self.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return fast.linear(out.transpose(1, 2).reshape(B, T, C), attn.c_proj.weight, attn.c_proj.bias)

    monkeypatch.setattr(fast.FastGPT, "attend", attend)
    assert cli.main(["check", "tiny", "--steps", "0"]) == 2
    assert re.search(r"expects h\.0\.attn \(causal_attention_packed\).*block_sites", capsys.readouterr().err)
