"""Settings: the presets, the overrides and their origins, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.backends import OPERATORS, by_operator
from model.config import (
    PRESETS,
    Config,
    all_keys,
    describe,
    flatten,
    full_key,
    parse_override,
    preset_names,
    read_toml,
    resolve,
    to_toml,
)


def test_overrides_win_over_the_preset_and_the_preset_over_the_defaults():
    config, origins = resolve("tiny", ["lr=0.5", "model.n_layer=3"])
    assert (config.train.lr, config.model.n_layer) == (0.5, 3)
    assert (config.train.steps, origins["train.steps"]) == (40, "preset tiny")
    assert (config.train.clip, origins["train.clip"]) == (1.0, "default")
    assert origins["train.lr"] == origins["model.n_layer"] == "command line"


def test_the_cpu_preset_is_nanogpts():
    config, _ = resolve("shakespeare-cpu")
    m, t = config.model, config.train
    assert (m.n_layer, m.n_head, m.n_embd, m.context, m.dropout, m.bias) == (4, 4, 128, 64, 0.0, False)
    assert (t.steps, t.batch, t.lr, t.min_lr, t.warmup) == (2000, 12, 1e-3, 1e-4, 100)
    assert (t.beta1, t.beta2, t.weight_decay, t.clip) == (0.9, 0.99, 0.1, 1.0)


@pytest.mark.parametrize(
    "text,value",
    [
        ("lr=1e-3", ("train.lr", 1e-3)),
        ("steps=1_000", ("train.steps", 1000)),
        ("bias=off", ("model.bias", False)),
        ("tie=yes", ("model.tie", True)),
        ("data=a=b", ("train.data", "a=b")),
        (" model.pos = none", ("model.pos", "none")),
    ],
)
def test_overrides(text, value):
    assert parse_override(text) == value


@pytest.mark.parametrize(
    "text,message",
    [
        ("steps", "must be written key=value, got 'steps'"),
        ("steps=1.5", "train.steps must be a whole number, got '1.5'"),
        ("lr=fast", "train.lr must be a number, got 'fast'"),
        ("bias=maybe", "model.bias must be on or off, got 'maybe'"),
        ("n_layers=2", "unknown key 'n_layers': the nearest is 'n_layer'"),
        ("model.n_haed=2", "the nearest is 'model.n_head'"),
        ("model.lr=1", "unknown key 'model.lr': the nearest is 'train.lr'"),
        ("learning_rate=1", "unknown key 'learning_rate': the nearest is 'lr'"),
    ],
)
def test_wrong_overrides(text, message):
    with pytest.raises(ValueError, match=message):
        parse_override(text)


@pytest.mark.parametrize(
    "override,message",
    [
        ("steps=0", "steps must be at least 1, got 0"),
        ("warmup=-1", "warmup must not be negative"),
        ("seed=18446744073709551616", "seed must be below 2 to the power of 64"),
        ("lr=0", "lr must be positive"),
        ("lr=nan", "lr must be finite"),
        ("min_lr=1", "min_lr must not exceed lr"),
        ("val_fraction=1", "val_fraction must be between 0 and 1"),
        ("beta2=1", r"beta2 must be in \[0, 1\)"),
        ("dtype=fp8", "dtype must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("backend=magic", "backend must be one of auto, .*reference.*, got 'magic'; for one operator"),
        ("backend=cpu,linear:", "backend must be one of auto, .*, got '' in 'cpu,linear:'"),
        ("backend=cpu,attention:cuda", "by operator for causal_attention, .*, got 'attention' in 'cpu,attention:cuda'"),
        ("backend=linear:cpu,linear:cuda", "must name one for linear, got cpu and cuda in"),
        ("backend=:cpu", "by operator for causal_attention, .*, got '' in ':cpu'"),
        ("backend=cpu,cuda", "must name one for all operators, got cpu and cuda in"),
        ("data=", "data must name a text"),
        ("name=a/b", "name must be a plain folder name"),
        ("n_head=3", "n_embd must be a multiple of n_head"),
        ("lora.rank=4", "lora.rank=4 needs weights to keep: give init="),
    ],
)
def test_wrong_values(override, message):
    with pytest.raises(ValueError, match=message):
        resolve("tiny", [override])


def test_the_written_configuration_reads_back(tmp_path):
    config, _ = resolve("tiny", ['data=a "quoted"\\ path\twith ümläut', "lr=1e-5", "min_lr=0"])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert resolve(str(path))[0] == config
    assert set(flatten(config)) == set(all_keys()) == {f"{s}.{k}" for s, t in read_toml(path).items() for k in t}


@pytest.mark.parametrize(
    "text,message",
    [
        ("lr = 1", "lr must stand in a"),
        ("[train]\nrate = 1", "unknown key 'train.rate'"),
        ("[train", "is not valid TOML"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve(str(path))


def test_wrong_types_in_a_file(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('[train]\nsteps = "ten"')
    with pytest.raises(TypeError, match="steps must be of type int, got 'ten'"):
        resolve(str(path))
    path.write_text("[train]\nlr = 1")
    assert resolve(str(path))[0].train.lr == 1.0


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no preset 'nope': choose .*gpt2-124m, .*shakespeare-cpu, tiny"):
        resolve("nope")
    assert preset_names() == sorted(p.stem for p in PRESETS.iterdir())


def test_every_key_is_short_named_described_and_shown():
    text = describe(Config(), {})
    for name, field in all_keys().items():
        assert full_key(name.split(".")[1]) == name  # a bare name is enough
        assert field.metadata["help"] in text and name in text
    assert len(all_keys()) < 50


@pytest.mark.parametrize(
    "text,expected",
    [
        ("auto", ["auto"] * 5),
        ("causal_attention:cuda", ["cuda", "auto", "auto", "auto", "auto"]),
        ("triton, causal_attention:cuda ,linear:reference", ["cuda", "triton", "reference", "triton", "triton"]),
        ("linear : cuda, cpu", ["cpu", "cpu", "cuda", "cpu", "cpu"]),
        ("linear_cross_entropy:auto,cpu", ["cpu", "cpu", "cpu", "cpu", "auto"]),
    ],
)
def test_backends_by_operator(text, expected):
    assert by_operator(text) == dict(zip(OPERATORS, expected, strict=True))


def test_settings_are_read_without_torch():
    """What --help, --print-config and a mistyped setting need takes no second of imports."""
    code = "import sys; from model.config import resolve; resolve('tiny', ['steps=3']); print('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "False\n"
