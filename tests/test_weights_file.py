"""State_dict files: read without their libraries, named and turned as ours, and checked."""

import json
import math

import pytest
import torch

from model import cli
from model.config import ModelConfig
from model.reference import GPT
from model.weights_file import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        raw = x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else b""
        header[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def model_of(**settings):
    torch.manual_seed(0)
    return GPT(ModelConfig(**{"vocab_size": 11, "context": 6, "n_layer": 2, "n_head": 2, "n_embd": 16, **settings}))


def same_function(found, model):
    idx = torch.arange(6)[None] % 11
    return torch.equal(found(idx)[0], model(idx)[0])


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"tie": False}, {"pos": "none"}, {"n_layer": 1}], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pt", "compiled"])
def test_a_state_dict_gives_the_model_back(tmp_path, settings, kind):
    model = model_of(**settings)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        write_safetensors(path, model.state_dict())
    else:
        before = "_orig_mod." if kind == "compiled" else ""
        torch.save({before + name: x for name, x in model.state_dict().items()}, path)
    said = [f"pos={settings['pos']}"] if "pos" in settings else []  # no shape tells it
    found, config = load_weights(path, ["n_head=2", "act=gelu_tanh", "context=6", *said])
    assert config.model == model.config and same_function(found, model)
    assert (found.lm_head.weight is found.transformer.wte.weight) == config.model.tie


def test_gpt2s_own_layout(tmp_path):
    """No prefix, (in, out) weights, and the causal mask beside them."""
    model = model_of()
    tensors = {}
    for name, x in model.state_dict().items():
        turned = x.dim() == 2 and ".h." in name
        tensors[name.removeprefix("transformer.")] = x.T.contiguous() if turned else x
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 6, 6)
    tensors["h.0.attn.masked_bias"] = torch.tensor([True])
    del tensors["lm_head.weight"]
    write_safetensors(tmp_path / "gpt2.safetensors", tensors)
    found, config = load_weights(tmp_path / "gpt2.safetensors", ["n_head=2", "act=gelu_tanh"])
    assert config.model == model.config and same_function(found, model)


def test_nanogpts_checkpoint_says_how_it_was_built(tmp_path):
    model = model_of(act="gelu")
    payload = {"model": model.state_dict(), "model_args": {"n_head": 2, "bias": True}, "iter_num": 3}
    torch.save(payload, tmp_path / "ckpt.pt")
    found, config = load_weights(tmp_path / "ckpt.pt", [])
    assert config.model == model.config and same_function(found, model)


def test_fewer_positions_and_16_bits(tmp_path):
    model = model_of(context=300)
    write_safetensors(tmp_path / "w.safetensors", {name: x.half() for name, x in model.state_dict().items()})
    found, config = load_weights(tmp_path / "w.safetensors", ["n_head=2", "act=gelu_tanh"])
    assert config.model.context == 128 and found.transformer.wpe.weight.shape == (128, 16)
    assert torch.equal(found.transformer.wpe.weight, model.transformer.wpe.weight[:128].half().float())
    assert (
        load_weights(tmp_path / "w.safetensors", ["n_head=2", "act=gelu_tanh", "context=300"])[1].model.context == 300
    )


def test_a_file_is_checked(tmp_path, capsys):
    torch.save(model_of().state_dict(), tmp_path / "w.pt")
    status = cli.main(["check", str(tmp_path / "w.pt"), "n_head=2", "act=gelu_tanh", "--steps", "2", "--band", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and "weights of the file (2 layers, 2 heads, width 16)" in lines[0]
    assert json.loads(lines[-1])["passed"] is True


@pytest.mark.parametrize(
    "content, overrides, message",
    [
        (None, [], "add n_head= (heads 64 wide: 1), act= (gelu_tanh is GPT-2's, gelu the exact one)\n"),
        (None, ["n_head=2"], "computes: add act= (gelu_tanh"),
        (
            dict(model_of(pos="none").state_dict()),
            ["n_head=2", "act=gelu"],
            "computes: add pos= (sinusoidal or none: there is no table)\n",
        ),
        (None, ["n_head=3", "act=gelu"], "n_embd must be a multiple of n_head"),
        (None, ["n_head=2", "act=gelu", "context=9"], "context must be at most the file's 6 positions, got 9"),
        (None, ["n_head=2", "act=gelu", "n_layer=3"], "does not fit"),
        ({"a.weight": torch.ones(2)}, [], "must have GPT-2's names"),
        ({}, [], "got no tensor"),
        ([torch.ones(2)], [], "must hold a dict of tensors, got list"),
        (math.sin, [], "weights_only=True"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, capsys, content, overrides, message):
    torch.save(model_of().state_dict() if content is None else content, tmp_path / "w.pt")
    assert cli.main(["check", str(tmp_path / "w.pt"), *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"step,loss\n"])
def test_what_is_no_file_of_torchs_is_said(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt must hold a state_dict"):
        load_weights(tmp_path / "w.pt", ["n_head=2", "act=gelu_tanh"])


def test_places_without_weights_are_said(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is none"):
        load_weights(tmp_path / "nowhere", ["n_head=2", "act=gelu_tanh"])
    (tmp_path / "config.toml").touch()
    with pytest.raises(ValueError, match=r"is a run: name the checkpoint in it to begin with, .*best\.pt"):
        load_weights(tmp_path, [])


def test_a_torn_safetensors_file_is_said(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, model_of().state_dict())
    for size in (0, 5, 100, path.stat().st_size - 3):
        (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            load_weights(tmp_path / "torn.safetensors", ["n_head=2", "act=gelu_tanh"])
