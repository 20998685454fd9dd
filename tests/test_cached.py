"""Keys and values that are kept: the same logits as a forward of all tokens, and the work of one token."""

import pytest
import torch
from oracle import BACKENDS
from test_model import make_reference

from model import fast
from model.cached import CachedGPT
from model.config import ModelConfig
from model.fast import FastGPT
from model.generate import generate

CONFIG = ModelConfig(vocab_size=23, context=12, n_layer=2, n_head=2, n_embd=16)


def make(backend="auto", **settings):
    return FastGPT.from_reference(make_reference(ModelConfig(**{**vars(CONFIG), **settings})), backend=backend).eval()


def tokens(T, seed=0):
    return torch.randint(23, (T,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "simt"])
@pytest.mark.parametrize("settings", [{}, {"pos": "sinusoidal"}, {"pos": "none", "bias": False, "tie": False}], ids=str)
def test_logits_are_those_of_all_tokens(backend, settings):
    """A beginning, one more, some more, another text, a shorter one, a full context, one beyond it."""
    model, text = make(backend, **settings), tokens(20)
    kept = CachedGPT(model)
    asked = [
        text[:3],
        text[:4],
        text[:9],
        text[:9],
        tokens(5, 1),
        text[:2],
        text[:11],
        text[:12],
        text[1:13],
        text[1:4],
    ]
    for each in asked:
        with torch.no_grad():
            whole = model(each[None])[0][0, -1]
        torch.testing.assert_close(kept.after(each), whole, rtol=1e-4, atol=1e-5)
    assert all(p is q for p, q in zip(kept.parameters(), model.parameters(), strict=True))


def rows_computed(call):
    """How many rows each LayerNorm has while call runs."""
    rows, layer_norm = set(), fast.layer_norm
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            fast, "layer_norm", lambda x, *args, **kw: rows.add(x.shape[-2]) or layer_norm(x, *args, **kw)
        )
        call()
    return rows


def test_new_tokens_are_computed_alone():
    """One after four, three after five, four after eight; then the window slides, and all are computed."""
    kept, text = CachedGPT(make()), tokens(13)
    asked = [
        (text[:4], 4),
        (text[:5], 1),
        (text[:8], 3),
        (text[:12], 4),
        (text[1:13], 12),
        (text[:6], 6),
        (text[:6], 6),
    ]
    for each, new in asked:
        assert rows_computed(lambda each=each: kept.after(each)) == {new}


def test_a_call_that_is_broken_off_leaves_nothing(monkeypatch):
    model, text = make(), tokens(6)
    kept = CachedGPT(model)
    kept.after(tokens(5, 1))
    with monkeypatch.context() as broken:
        broken.setattr(CachedGPT, "think", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kept.after(text[:5])
    for each in (torch.cat((tokens(5, 1), text[:1])), text):
        torch.testing.assert_close(kept.after(each), CachedGPT(model).after(each))


def test_what_changes_between_tokens_is_noticed():
    """Autocast, inference mode, the weights' dtype and the weights, and a text that is changed in place."""
    model, text = make(pos="sinusoidal"), tokens(8)
    kept = CachedGPT(model)

    def check():
        for T in (3, 4):
            torch.testing.assert_close(kept.after(text[:T]), CachedGPT(model).after(text[:T]))

    check()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check()
    with torch.inference_mode():
        check()
    kept.after(text[:3])
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        model.transformer.h[0].attn.c_attn.weight.neg_()
    check()
    kept.after(text[:3])
    text[0] = (text[0] + 1) % 23
    check()
    model.bfloat16()
    check()


def test_unknown_tokens_are_named():
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 23\), got 99"):
        next(generate(make(), torch.tensor([1, 99]), 3))


def test_methods_and_hooks_of_an_object_are_called():
    model, calls = make(), []
    model.attend = lambda attn, h, layer, seed: calls.append(layer) or torch.zeros_like(h)
    list(generate(model, tokens(3), 2))
    assert calls == [0, 1, 0, 1]
    model = make()
    model.register_forward_hook(lambda *_: calls.append("hook"))
    list(generate(model, tokens(3), 2))
    assert calls[4:] == ["hook", "hook"]


def test_generate_keeps_what_it_can():
    model = make(dropout=0.4).train()
    right = list(generate(model.to_reference(), tokens(3), 30, temperature=0.0))
    assert list(generate(model, tokens(3), 30, temperature=0.0)) == right
    assert list(generate(model, tokens(3), 30, temperature=0.0, keep=False)) == right
    assert model.training


def test_a_subclass_with_an_attention_of_its_own_is_asked_itself():
    class Blind(FastGPT):
        def attend(self, attn, h, layer, seed):
            return torch.zeros_like(h)

    model, text = Blind(CONFIG).eval(), tokens(3)
    for token in generate(model, text, 5, temperature=0.0):
        assert token == int(model(text[None])[0][0, -1].argmax())
        text = torch.cat((text, torch.tensor([token])))
