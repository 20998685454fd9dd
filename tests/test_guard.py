"""What is said of a step or an evaluation that is not finite: which one, and which tensor of it first."""

import json
import math

import pytest
import torch
from training_case import chosen, same_values, small_settings

from model import optimize
from model import state as state_module
from model import train as training
from model.checkpoint import LAST, load
from model.train import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    return [*small_settings(tmp_path), "batch=4", "eval_every=4"]


def test_a_weight_that_is_not_finite_is_named(settings, tmp_path, monkeypatch):
    real = state_module.build_model

    def broken(*settings):
        model = real(*settings)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 5] = math.nan
        return model

    monkeypatch.setattr(state_module, "build_model", broken)
    with pytest.raises(
        RuntimeError, match=r"at step 1; not finite first: transformer\.h\.1\.mlp\.c_fc\.weight \(1 of 1024 values\)"
    ):
        train(chosen(settings, "name=a"), quiet=True)
    assert not (tmp_path / "a" / LAST).exists()


def test_a_gradient_norm_that_overflows_is_told_from_a_broken_forward(settings, tmp_path):
    state = training.prepare(chosen(settings), tmp_path)
    state.model.transformer.h[0].attn.c_proj.bias.register_hook(lambda gradient: gradient * 1e30)
    with pytest.raises(
        RuntimeError, match="not finite first: no value, only the gradients' norm, whose squares overflow"
    ):
        training.timed_step(state)


def test_a_loss_that_is_not_finite_beside_finite_gradients_is_the_forwards(settings, tmp_path, monkeypatch):
    real = optimize.loss_of
    monkeypatch.setattr(optimize, "loss_of", lambda *arguments: real(*arguments) + math.inf)
    state = training.prepare(chosen(settings), tmp_path)
    with pytest.raises(RuntimeError, match="not finite first: no weight and no block's output, only the loss"):
        training.timed_step(state)


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("more", [[], ["recompute=full"], ["micro_batch=1"]], ids=["plain", "recompute", "micro"])
def test_a_forward_that_overflows_names_its_block(settings, tmp_path, kind, more):
    """The gradients behind it are not finite either, the first of them that of the embedding: no help."""
    state = training.prepare(chosen(settings, f"model={kind}", *more), tmp_path)
    mlp = state.model.transformer.h[1].mlp
    weights = [mlp.c_fc.weight, mlp.c_proj.weight]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_mul_(weights, 1e38)
    with pytest.raises(RuntimeError, match=r"at step 1; not finite first: the output of block 1 \(\d+ of \d+ values\)"):
        training.timed_step(state)
    assert ("block" in vars(state.model)) == (kind == "fast" and more == ["recompute=full"])  # it is as it was
    optimize.copy([weight.detach() for weight in weights], before)
    state.learner.held_back.zero_()
    assert math.isfinite(training.timed_step(state)["loss"])


def test_an_evaluation_that_is_not_finite_ends_the_run_before_its_checkpoint(settings, tmp_path, monkeypatch):
    real = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *a: real(*a) | ({"val_loss": math.nan} if a[3] == 8 else {}))
    with pytest.raises(
        RuntimeError, match="validation loss must be finite, got nan after step 8; not finite first: no w"
    ):
        train(chosen(settings, "name=a"), quiet=True)
    assert load(tmp_path / "a", LAST)["step"] == 4
    monkeypatch.setattr(training, "evaluate", real)
    assert resume(tmp_path / "a", quiet=True)["step"] == 12


def test_weights_that_break_in_the_last_step_are_named(settings, tmp_path):
    with pytest.raises(RuntimeError, match=r"validation loss must be finite, .* after step 1; not finite first: .+wte"):
        train(chosen(settings, "name=a", "lr=1e38", "min_lr=1e38", "steps=1", "weight_decay=100"), quiet=True)


def test_a_gradient_that_is_not_finite_is_named_and_changes_no_weight(settings, tmp_path):
    state = training.prepare(chosen(settings), tmp_path)
    weight = state.model.transformer.h[0].attn.c_proj.bias
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"not finite first: the gradient of transformer\.h\.0\.attn\.c_proj\.bias"):
        training.timed_step(state)
    assert same_values(before, state.model.state_dict())
    kept = json.loads((tmp_path / "step-1.json").read_text())
    assert (
        kept["norm"] in ("nan", "inf")
        and len(kept["texts"]) == 4
        and kept["texts"][0] in (tmp_path / "text.txt").read_text()
    )
