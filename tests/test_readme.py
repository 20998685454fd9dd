"""README's Python: what it shows runs, and does what its words say."""

import math
import re
from pathlib import Path

import pytest
import torch
from training_case import TEXT, chosen, small_settings

from model.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

README = Path(__file__).parent.parent / "README.md"
OPERATORS, RESEARCH, SERVE = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code, changes=(), **names):
    """The names that code leaves behind; changes are (its words, those that make it small)."""
    for words, small in changes:
        assert code.count(words) == 1, words
        code = code.replace(words, small)
    exec(compile(code, README.name, "exec"), names)
    return names


def test_the_operators():
    B, T, H, D = 2, 5, 2, 8
    C, V = H * D, 11
    x, branch = torch.randn(B, T, C), torch.randn(B, T, C)
    sizes = {"B": B, "T": T, "H": H, "D": D, "w_qkv": torch.randn(3 * C, C), "w_head": torch.randn(V, C)}
    found = run(
        OPERATORS, torch=torch, x=x, branch=branch, ln=torch.nn.LayerNorm(C), targets=torch.arange(B * T), **sizes
    )
    torch.testing.assert_close(found["x"], x + branch, rtol=0, atol=0)
    assert found["out"].shape == (B, T, H, D) and found["loss"].shape == ()


def test_an_attention_of_ones_own_is_trained(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    changes = [('"shakespeare", 0.1', f'"{tmp_path}/text.txt", 0.1'), ("range(100)", "range(20)")]
    found = run(RESEARCH, changes)
    words = found["config"].model.vocab_size or len(found["data"].tokenizer)
    assert found["loss"].item() < math.log(words) - 0.5
    model, x = found["model"], found["x"]
    plain = found["FastGPT"].from_reference(model.to_reference())
    assert not torch.allclose(model(x)[0], plain(x)[0])  # its own attention is another function


def test_a_run_is_served_and_quantised(tmp_path, capsys, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    train(chosen(small_settings(tmp_path), "name=a", "n_embd=32"), quiet=True)
    monkeypatch.chdir(tmp_path)
    found = run(SERVE.replace('"ROMEO:"', '"the"'), [('"runs/NAME"', f'"{tmp_path}/a"')])
    assert len(capsys.readouterr().out) > 200
    again = found["with_nn_linear"](found["model"])
    again.load_state_dict(torch.load("small.pt"), assign=True)
    x = torch.arange(8)[None]
    torch.testing.assert_close(again(x)[0], found["small"](x)[0], rtol=0, atol=0)
    assert isinstance(again.lm_head.weight, type(found["small"].lm_head.weight)) and quantization
