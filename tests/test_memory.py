"""Memory: micro batches that are made smaller, what is computed again, the estimate."""

import os

import pytest
import torch
from training_case import chosen, gradients, same_weights, small_settings, some_batch

from model import memory, optimize
from model import state as state_module
from model import train as training
from model.backends import OPERATORS
from model.checkpoint import build_model, load
from model.config import resolve
from model.evaluate import loss_of
from model.memory import activation_bytes
from model.optimize import Learner
from model.ranks import Ranks
from model.recompute import recompute
from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    return small_settings(tmp_path)


# Of a GPU, of this library's C++, of torch's own allocator on a CPU.
FULL = [
    torch.OutOfMemoryError("tried to allocate 2.00 GiB\nand more of a message"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


def out_of_memory_above(monkeypatch, limit, from_call=0, error=FULL[0]):
    """Let forwards of more than so many sequences run out of memory."""
    real, calls = optimize.loss_of, []

    def tight(model, config, x, y, seed=None):
        calls.append(len(x))
        loss = real(model, config, x, y, seed)
        if len(x) > limit and len(calls) > from_call:
            raise error
        return loss

    monkeypatch.setattr(optimize, "loss_of", tight)
    return calls


@pytest.mark.parametrize("error", FULL, ids=["gpu", "c++", "torch"])
@pytest.mark.parametrize("from_call", [0, 4], ids=["first step", "later step"])
def test_what_does_not_fit_is_made_in_smaller_parts(settings, tmp_path, monkeypatch, capsys, from_call, error):
    """Eight sequences, then four, then two: no step is lost, and none is made twice."""
    if not from_call:
        whole = train(chosen(settings, "micro_batch=2", "name=two"), quiet=True)
    else:
        whole = train(chosen(settings, "name=all"), quiet=True)
    calls = out_of_memory_above(monkeypatch, 2, from_call, error)
    result = train(chosen(settings, "name=auto"))
    assert "micro batches of 8 do not fit into memory: going on with 4\n" in capsys.readouterr().out
    assert calls == [8] * from_call + [8, 4] + [2] * 4 * (12 - from_call) and load(tmp_path / "auto")["micro"] == 2
    assert result["val_loss"] == (whole["val_loss"] if not from_call else pytest.approx(whole["val_loss"], rel=1e-5))


def test_half_of_an_accumulated_gradient_is_thrown_away(settings, monkeypatch):
    """The second of two micro batches does not fit: the first one's gradient must not count twice."""
    states = [training.prepare(chosen(settings), None) for _ in range(2)]
    states[0].learner.micro, states[1].learner.micro = 2, 4
    real, calls = optimize.loss_of, []

    def second_fails(*args):
        calls.append(0)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    training.timed_step(states[0])
    calls.clear()
    monkeypatch.setattr(optimize, "loss_of", second_fails)
    calls += [0] * 4
    training.timed_step(states[1])
    assert len(calls) == 10 and states[1].learner.micro == 2 and same_weights(states[0].model, states[1].model)


def test_what_never_fits_is_told(settings, monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    message = r"micro_batch={} does not fit into memory \(tried to allocate 2.00 GiB\): set a smaller one "
    for micro, last in (("auto", 1), ("4", 4)):
        with pytest.raises(RuntimeError, match=message.format(last)):
            train(chosen(settings, f"micro_batch={micro}"), quiet=True)


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_computed_again_has_the_same_bits(settings, kind, dtype):
    results = []
    for mode in ("none", "selective", "full"):
        config = chosen(
            settings, f"recompute={mode}", f"model={kind}", f"dtype={dtype}", "dropout=0.1", "vocab_size=40"
        )
        torch.manual_seed(0)
        learner = Learner(config, build_model(config), 8)
        x, y = some_batch(30, False)
        results.append(gradients(learner, x, y, 4))
    for name, plain in results[0].items():
        assert all(torch.equal(plain, other[name]) for other in results[1:]), name


def kept_bytes(config):
    """What a forward of 12 sequences keeps for its backward, and the estimate of it."""
    model = build_model(config)
    recompute(model, config.train.recompute)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    x = torch.randint(65, (12, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss_of(model, config, x, x, seed=1)
    backends = model.backends() if config.train.model == "fast" else {}
    return sum(size for size, _ in kept.values()), activation_bytes(config, 12, backends)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "reference", *(f"auto,{operator}:reference" for operator in OPERATORS)])
def test_the_estimate_of_kept_activations(dtype, backend, dropout):
    shape = ["vocab_size=65", "n_layer=2", f"dropout={dropout}"]
    config, _ = resolve("shakespeare-cpu", [f"dtype={dtype}", f"backend={backend}", *shape])
    truth, guess = kept_bytes(config)
    # Plain GELU and softmax in bf16 are counted as on a GPU, whose autocast takes them in fp32: 16 bytes an element of the
    # MLP for a CPU's 10, and 6 a weight of attention (7 with dropout) for 2 (5).
    fewer_here = dtype == "bf16" and backend.removeprefix("auto,").partition(":")[0] in (
        "reference",
        "gelu_mlp",
        "causal_attention",
    )
    assert 0.9 * truth < guess < (1.6 if fewer_here else 1.1) * truth


def test_the_estimate_of_what_recompute_leaves():
    """Of two depths, so that the layer that a backward holds meanwhile cancels; selective is by operator in a dict of its own."""
    layers = []
    for count in (2, 4):
        config, _ = resolve("shakespeare-cpu", ["recompute=full", "vocab_size=65", f"n_layer={count}"])
        layers.append(kept_bytes(config))
    truth, guess = (b - a for a, b in zip(*layers, strict=True))
    assert guess == pytest.approx(truth, rel=0.02)
    backends = dict.fromkeys(OPERATORS, "cpu")
    sizes = [activation_bytes(resolve("shakespeare", [f"recompute={mode}", "vocab_size=65"])[0], 64, backends)
             for mode in ("none", "selective", "full")]  # fmt: skip
    assert sizes[0] > 1.2 * sizes[1] > 1.5 * sizes[2]


@pytest.mark.parametrize("bias", ["on", "off"])
def test_the_estimate_of_weights_on_ranks(bias):
    """A rank with parts holds two blocks and what is around them whole, and gradients until they are exchanged."""
    shape = [f"bias={bias}", "vocab_size=65", "batch=8", "ema=0.9"]
    config, _ = resolve("shakespeare-cpu", [*shape, "parallel=fsdp"])
    model = build_model(config)
    total, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.transformer.h[0]))
    weights = total - 2 * block
    assert memory.state_bytes(config, total, total, Ranks(), 8) == (20 * total, 0)
    assert memory.state_bytes(config, total, total, Ranks(0, 4), 2) == (5 * total + 8 * weights, 0)
    assert memory.state_bytes(config, total, total, Ranks(0, 4), 1) == (5 * total + 4 * weights + 4 * total, 0)
    config, _ = resolve("shakespeare-cpu", [*shape, "parallel=fsdp", "offload=on"])
    assert memory.state_bytes(config, total, total, Ranks(0, 4), 2) == (8 * weights, 5 * total)
    config, _ = resolve("shakespeare-cpu", shape)
    assert memory.state_bytes(config, total, total, Ranks(0, 4), 2) == (20 * total, 0)


def test_other_errors_of_a_step_are_no_lack_of_memory(settings, monkeypatch):
    calls = out_of_memory_above(monkeypatch, 2, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(chosen(settings), quiet=True)
    assert calls == [8]


def test_a_run_on_a_cpu_takes_what_its_memory_holds(settings, monkeypatch):
    """The room is what the weights' gradients and AdamW leave of it; a fifth stays free."""
    one = activation_bytes(chosen(settings, "vocab_size=64"), 1, dict.fromkeys(OPERATORS, "cpu"))
    state = training.prepare(chosen(settings, "vocab_size=64"), None)
    assert state.learner.micro == 8
    held = 12 * sum(p.numel() for p in state.model.parameters())
    for room, micro in ((5.1, 4), (2.6, 2), (0.1, 1)):
        monkeypatch.setattr(state_module, "host_room", lambda room=room: held + int(room * one))
        assert training.prepare(chosen(settings, "vocab_size=64"), None).learner.micro == micro


def test_the_room_of_this_machine(monkeypatch, tmp_path):
    """Between nothing and all of its memory; all of it where nothing tells."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.host_room() <= total
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.host_room() == total


@pytest.mark.parametrize("version", [1, 2])
def test_the_room_of_a_container(monkeypatch, tmp_path, version):
    """Its limit less what it uses, of which the pages of files it has read can be dropped; none where it says max."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.container_room() > 1 << 60
    folder, limit, used = {
        1: (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: (tmp_path, "memory.max", "memory.current"),
    }[version]
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("8000\n")
    (folder / used).write_text("7000\n")
    (folder / "memory.stat").write_text("anon 900\nactive_file 4000\ninactive_file 2000\n")
    assert memory.container_room() == 7000 and memory.host_room() == 7000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.host_room() == 1750
    (folder / limit).write_text("max\n")
    assert memory.container_room() > 1 << 60
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:   40 kB\n")
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    assert memory.host_room() == 10240


def test_the_first_micro_batch_is_what_should_fit():
    config, _ = resolve("gpt2-124m")
    backends = dict.fromkeys(OPERATORS, "triton")
    one = activation_bytes(config, 1, backends)
    assert [memory.largest_micro(config, 512, int(room * one), backends) for room in (0.5, 2, 25, 1e6)] == [
        1,
        1,
        16,
        512,
    ]
