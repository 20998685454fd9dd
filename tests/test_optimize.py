"""A step of training: the same gradient however it is split, the clip and the guard as tensors, precision, compiling."""

import json
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training_case import chosen, gradients, same_weights, small_settings, some_batch

from model import optimize, precision
from model import train as training
from model.checkpoint import BEST, LAST, build_model, load
from model.config import resolve
from model.data import random_batch
from model.evaluate import loss_of
from model.guard import Spikes
from model.micro import split
from model.optimize import Learner, learning_rate
from model.precision import DTYPES, autocast, choose_dtype
from model.reference import GPT
from model.run_files import read_metrics
from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path):
    return small_settings(tmp_path)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_the_gradient_is_the_same_however_the_step_is_split(kind, ignored):
    """Against the whole batch in float64, with the error that the whole batch in float32 makes as the measure."""
    config = resolve("tiny", [f"model={kind}", "vocab_size=11"])[0]
    torch.manual_seed(0)
    learner = Learner(config, build_model(config), 8)
    x, y = some_batch(11, ignored)
    oracle = GPT(config.model).double()
    oracle.load_state_dict(learner.model.state_dict())
    loss = oracle(x, y)[1]
    loss.backward()
    exact = {"loss": loss} | {name: p.grad for name, p in oracle.named_parameters()}
    plain = GPT(config.model)
    plain.load_state_dict(learner.model.state_dict())
    plain(x, y)[1].backward()
    for micro in (8, 4, 2, 1):
        found = gradients(learner, x, y, micro)
        for name, p in plain.named_parameters():
            budget = 3 * (p.grad - exact[name]).abs().max() + 1.2e-7 * exact[name].abs().max()
            # A sum in micro batches rounds once more for each of them.
            budget += (8 // micro - 1) * 6e-8 * exact[name].abs().max()
            assert (found[name] - exact[name]).abs().max() <= budget, (micro, name)
        assert abs(found["loss"] - exact["loss"]) <= 1e-6 * exact["loss"]


def test_the_mean_of_means_is_another_gradient():
    """What the test above would not be able to see without ignored targets."""
    config = resolve("tiny", ["vocab_size=11"])[0]
    model = build_model(config)
    x, y = some_batch(11, ignored=True)
    whole = loss_of(model, config, x, y)
    halves = [loss_of(model, config, x[part], y[part]) for part in (slice(0, 4), slice(4, 6))]
    assert abs(sum(halves) / 2 - whole) > 1e-3
    shares = [part.share for part in split(x, y, 4, CPU)]
    assert shares == [64 / 70, 6 / 70] and split(x, y, 2, CPU)[3].share == 0.0
    with pytest.raises(ValueError, match="a step must have a target to predict"):
        split(x, torch.full_like(y, -100), 2, CPU)


def test_each_micro_batch_has_its_own_dropout(settings):
    state = training.prepare(chosen(settings, "dropout=0.5", "micro_batch=4"), None)
    x, y = some_batch(len(state.dataset.tokenizer), False)
    x[4:], y[4:] = x[:4], y[:4]
    state.model.train()
    first, second = (gradients(state.learner, part, target, 4)["loss"] for part, target in ((x[:4], y[:4]), (x, y)))
    assert abs(first - second) > 1e-4  # the second half repeats the sequences, not their masks


def test_a_run_in_micro_batches_is_the_same_run(settings):
    whole, parts = (train(chosen(settings, more), quiet=True) for more in ("micro_batch=8", "micro_batch=2"))
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_batch_tokens_and_batch_are_two_names_of_one_size(settings, capsys):
    config = chosen(settings, "batch_tokens=64")
    assert config.sequences == 4 and chosen(settings, "batch_tokens=64", "batch=6").sequences == 6
    train(chosen(settings, "batch_tokens=64", "micro_batch=2"))
    assert "4 x 16 = 64 tokens in 2 micro batches of 2" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="batch_tokens must be a multiple of context, got 70 and 16: 64 is the nearest"
    ):
        chosen(settings, "batch_tokens=70")
    with pytest.raises(ValueError, match="must divide the step's 8 sequences, got 3: 1, 2, 4 and 8 do"):
        chosen(settings, "micro_batch=3")
    with pytest.raises(ValueError, match="micro_batch must be auto or a number of sequences, got 'some'"):
        chosen(settings, "micro_batch=some")


def test_half_precision_of_each_kind_trains(settings):
    """The losses follow fp32's within what the format rounds off, the weights stay fp32, fp16 has its scaler."""
    losses = {d: train(chosen(settings, f"dtype={d}"), quiet=True)["val_loss"] for d in DTYPES}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert losses["fp32"] != losses[name] == pytest.approx(losses["fp32"], rel=4 * torch.finfo(dtype).eps)
    state = training.prepare(chosen(settings, "dtype=fp16"), None)
    training.timed_step(state)
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert state.learner.scaler.get_scale() == 2.0**16


def test_fp16_leaves_out_a_step_that_overflows_and_scales_less(settings):
    state = training.prepare(chosen(settings, "dtype=fp16"), None)
    state.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.clone() for name, p in state.model.state_dict().items()}
    row = training.timed_step(state)
    assert not math.isfinite(row["grad_norm"]) and state.learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], p) for name, p in state.model.state_dict().items())
    for _ in range(30):
        row = training.timed_step(state)
    assert math.isfinite(row["grad_norm"]) and not torch.equal(before["lm_head.weight"], state.model.lm_head.weight)


def test_a_step_that_fails_holds_all_later_ones_back(settings, tmp_path, monkeypatch):
    """As on a GPU, where losses are read some steps later: the failed step is named, its weights are still there."""
    config = chosen(settings, "log_every=6")
    state = training.prepare(config, tmp_path)
    monkeypatch.setattr(training, "reads_each_step", lambda state: False)
    for _ in range(2):
        assert training.timed_step(state) is None
    before = {name: p.clone() for name, p in state.model.state_dict().items()}
    weight, calls = state.model.transformer.h[1].ln_2.weight, []
    x, _ = random_batch(state.dataset.train, 8, 16, config.train.seed, 2)

    def spoil(gradient):
        calls.append(0)
        return gradient * (math.nan if len(calls) in (1, 5) else 1.0)  # step 3, and when it is made again

    handle = weight.register_hook(spoil)
    for _ in range(3):
        assert training.timed_step(state) is None
    with pytest.raises(
        RuntimeError, match=r"at step 3; not finite first: the gradient of transformer\.h\.1\.ln_2\.weight"
    ):
        training.timed_step(state)
    handle.remove()
    assert state.step == 2 and all(torch.equal(before[name], p) for name, p in state.model.state_dict().items())
    assert torch.equal(x, training.step_batch(state, 2)[0])


def test_steps_are_read_where_they_are_logged(settings, tmp_path, monkeypatch):
    """The same run, bit for bit, whether each loss is waited for or only those that are written down."""
    train(chosen(settings, "log_every=5", "name=each"), quiet=True)
    monkeypatch.setattr(training, "reads_each_step", lambda state: False)
    train(chosen(settings, "log_every=5", "name=some"), quiet=True)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("each", "some")]
    assert [row["step"] for row in rows[0]] == ["5", "10", "12"]
    for each, some in zip(*rows, strict=True):
        assert all(each[key] == some[key] for key in ("loss", "grad_norm", "lr", "val_loss"))


def test_auto_is_what_the_hardware_has(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype("auto", cuda) == "bf16" and choose_dtype("fp32", cuda) == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_dtype("auto", cuda) == "fp16" and choose_dtype("auto", cpu) == "fp32"
    with autocast("bf16", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert precision.to_device(torch.ones(1), cpu).device.type == "cpu"


def test_the_run_keeps_the_dtype_that_auto_meant(settings, tmp_path):
    train(chosen(settings, "name=a"), quiet=True)
    assert resolve(str(tmp_path / "a" / "config.toml"))[0].train.dtype == "fp32"


def test_tf32_is_what_torch_is_told(settings):
    training.prepare(chosen(settings, "tf32=on"), None)
    assert torch.backends.cuda.matmul.allow_tf32
    training.prepare(chosen(settings), None)
    assert not torch.backends.cuda.matmul.allow_tf32


# torch's own: Dynamo instantiates an autograd.Function while it traces one, and inductor imports torch.jit.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_step_is_the_same_step(settings, monkeypatch):
    """Without a graph break: the whole forward is one graph, made once for all seeds of dropout, and the losses stay.

    Inductor takes a minute for the ten rounds of each mask, so the graph is run as it was traced.
    """
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: real(model, fullgraph=fullgraph, backend=counter))
    torch._dynamo.reset()
    more = ["micro_batch=4", "steps=3", "eval_every=3", "n_layer=1", "dropout=0.2"]
    eager, compiled = (train(chosen(settings, *more, f"compile={word}"), quiet=True) for word in ("off", "on"))
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-6) and counter.frame_count == 1


def test_one_step_is_adamw_on_the_clipped_gradient(settings):
    """timed_step against the same step from torch's parts, in every bit."""
    config = chosen(settings, "clip=0.5", "warmup=0")
    state, twin = training.prepare(config, None), training.prepare(config, None)
    x, y = random_batch(twin.dataset.train, 8, 16, config.train.seed, 0)
    loss = twin.model(x, y)[1]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.model.parameters()])
    for p in twin.model.parameters():
        p.grad /= norm / 0.5
    twin.learner.optimizer.step()
    row = training.timed_step(state)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (loss.item(), norm.item(), 3e-3) and norm > 0.5
    assert same_weights(state.model, twin.model)


def test_decay_is_for_matrices_and_counts_a_tied_one_once():
    model = build_model(resolve("tiny", ["vocab_size=7"])[0])
    groups = optimize.make_optimizer(model, resolve("tiny")[0]).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert ids.count(id(model.lm_head.weight)) == 1


def test_the_schedule():
    config, _ = resolve("shakespeare-cpu")
    rates = [learning_rate(step, config) for step in range(2001)]
    assert rates[0] == pytest.approx(1e-3 / 101) and rates[100] == 1e-3 == max(rates)
    assert rates[1050] == pytest.approx(5.5e-4) and rates[2000] == pytest.approx(1e-4) == min(rates[100:])
    assert learning_rate(9999, config) == pytest.approx(1e-4)
    config, _ = resolve("shakespeare-cpu", ["schedule=wsd", "decay=0.25"])
    rates = [learning_rate(step, config) for step in range(2001)]
    assert rates[50] < rates[100] == rates[1500] == 1e-3 and rates[2000] == pytest.approx(1e-4)
    assert rates[1625] == pytest.approx(1e-4 + 9e-4 * 0.5) and rates[1500:] == sorted(rates[1500:], reverse=True)


def test_the_average_is_what_is_evaluated(settings, tmp_path):
    """Its own weights go on as without it; best.pt has the average (tests/test_kill.py: a resumed run has its bits)."""
    plain = training.prepare(chosen(settings), None)
    state = training.prepare(chosen(settings, "ema=0.9"), None)
    average = [p.detach().clone() for p in state.model.parameters()]
    for step in range(3):
        training.timed_step(plain)
        training.timed_step(state)
        for mean, p in zip(average, state.model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - (1 + step) / (10 + step))
    assert same_weights(plain.model, state.model)
    with state.learner.averaged():
        assert all(map(torch.equal, average, state.model.parameters()))
    assert same_weights(plain.model, state.model)
    result = train(chosen(settings, "ema=0.9", "steps=8", "eval_every=4", "name=a"), quiet=True)
    best, last = (load(tmp_path / "a", name) for name in (BEST, LAST))
    assert result["best_step"] == 8
    for i, name in enumerate(name for name, _ in state.model.named_parameters()):
        assert torch.equal(best["model"][name], last["average"][i])
        assert not torch.equal(best["model"][name], last["model"][name])


def test_the_average_forgets_the_initial_weights(settings):
    """Of the weights before the first step little is left; from then on that ema keeps, no less."""
    config = chosen(settings, "ema=0.999")
    left = math.prod(optimize.averaging(step, config) for step in range(2000))
    assert left < 1e-6 < 0.13 < 0.999**2000
    assert optimize.averaging(8991, config) == 0.999 > optimize.averaging(8989, config)
    assert optimize.averaging(1, chosen(settings, "ema=0.1")) == 0.1


def test_a_resume_may_change_how_to_train(settings, tmp_path):
    """An average that begins there begins at the weights, fp16 with a scale of its own, betas and decay are the new ones."""
    train(chosen(settings, "steps=4", "eval_every=4", "name=a"), quiet=True)
    payload = load(tmp_path / "a", LAST)
    more = ["steps=8", "ema=0.9", "dtype=fp16", "weight_decay=0.5", "beta1=0.5", "beta2=0.6"]
    state = training.prepare(chosen(settings, *more), None, payload)
    assert all(map(torch.equal, state.learner.average, state.model.parameters()))
    assert torch.equal(state.model.lm_head.weight, payload["model"]["lm_head.weight"])
    assert state.learner.scaler.get_scale() == 2.0**16
    groups = state.learner.optimizer.param_groups
    assert [(g["weight_decay"], g["betas"]) for g in groups] == [(0.5, (0.5, 0.6)), (0.0, (0.5, 0.6))]
    assert all(state.learner.optimizer.state[p]["step"] == 4 for g in groups for p in g["params"])


def test_a_spike_keeps_its_text(settings, tmp_path, monkeypatch, capsys):
    real = optimize.loss_of

    def spoil(model, config, x, y, seed=None):
        loss = real(model, config, x, y, seed)
        return loss * 5 if loss.requires_grad and len(done) == 110 else loss

    done = []
    take = training.timed_step
    monkeypatch.setattr(training, "timed_step", lambda state: (take(state), done.append(0))[0])
    monkeypatch.setattr(optimize, "loss_of", spoil)
    train(chosen(settings, "steps=120", "eval_every=120", "name=a", "lr=1e-4", "min_lr=1e-4"))
    out = capsys.readouterr().out
    assert out.count("is usual; its text is kept in") == 1 and f"{tmp_path}/a/step-111.json" in out
    kept = json.loads((tmp_path / "a" / "step-111.json").read_text())
    assert kept["loss"] > 4 * kept["usual"] and len(kept["texts"]) == 8 and len(kept["tokens"][0]) == 17


def test_what_is_a_spike():
    before, spikes = Spikes(), Spikes()
    losses = [3.0 + 0.1 * (-1) ** i for i in range(100)]
    assert not any(before.usual(loss) for loss in [9.0, *losses, 3.2])  # at the start, everything falls
    spikes.restore(before.pack())  # a resumed run knows what is usual
    assert spikes.usual(4.5) == pytest.approx(3.0, abs=0.1) and spikes.usual(3.1) is None
    last = Spikes(spikes.recent.copy(), found=9)
    assert [last.usual(9.0) is None for _ in range(2)] == [False, True]  # a run keeps ten
