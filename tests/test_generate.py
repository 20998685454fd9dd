"""Sampling: the distributions against their definitions, the seed, the window and the padded vocabulary."""

import pytest
import torch

from model.config import ModelConfig
from model.fast import FastGPT
from model.generate import generate, next_token_probabilities
from model.reference import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(vocab_size=11, context=8, n_layer=1, n_head=2, n_embd=16, dropout=0.3)
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def make_model(kind=GPT, std=0.1):
    torch.manual_seed(2)
    model = kind(CONFIG)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=std)
    return model


def probabilities(temperature=1.0, top_k=0, top_p=1.0, logits=LOGITS):
    return next_token_probabilities(logits, temperature, top_k, top_p)


def test_temperature_divides_the_logits():
    torch.testing.assert_close(probabilities(), torch.softmax(LOGITS, 0))
    torch.testing.assert_close(probabilities(0.5), torch.softmax(2 * LOGITS, 0))
    assert probabilities(0.0).tolist() == [0, 1, 0, 0]
    assert probabilities(1e-30).tolist() == [0, 1, 0, 0]


def test_top_k_keeps_the_likeliest():
    expected = torch.softmax(torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]), 0)
    torch.testing.assert_close(probabilities(top_k=2), expected)
    torch.testing.assert_close(probabilities(top_k=99), torch.softmax(LOGITS, 0))


def test_top_p_keeps_the_smallest_set_that_has_p():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    for p, expected in ((0.4, [0, 1, 0]), (0.6, [0, 0.625, 0.375]), (0.81, [0.2, 0.5, 0.3]), (1.0, [0.2, 0.5, 0.3])):
        torch.testing.assert_close(probabilities(top_p=p, logits=logits), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", [GPT, FastGPT])
def test_a_seed_gives_one_text(kind):
    model, prompt = make_model(kind), torch.tensor([1, 2])

    def text(seed):
        return list(generate(model, prompt, 30, seed=seed))

    torch.manual_seed(5)
    first = text(0)
    torch.manual_seed(6)  # the global state plays no part, and dropout is off
    assert first == text(0) != text(1)
    assert model.training


def test_the_likeliest_token_follows_the_last_context_tokens():
    model = make_model().eval()
    tokens = [3, 1, 4]
    for token in generate(model, torch.tensor(tokens), 20, temperature=0.0):
        assert token == int(model(torch.tensor([tokens[-8:]]))[0][0, -1].argmax())
        tokens.append(token)
    long = torch.arange(30) % 11
    assert list(generate(model, long, 5, temperature=0.0)) == list(generate(model, long[-8:], 5, temperature=0.0))


def test_a_padded_vocabulary_is_never_asked_for():
    model = make_model(std=0.0)  # all logits equal: every token is as likely
    assert max(generate(model, torch.tensor([0]), 200)) == 10
    assert max(generate(model, torch.tensor([0]), 200, vocabulary=4)) == 3


def test_a_pause_leaves_gradients_on():
    tokens = generate(make_model(), torch.tensor([0]), 2)
    next(tokens)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"temperature": -1.0}, "temperature must be 0 .* or positive, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 .* or positive, got nan"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), torch.tensor([0]), 1, **setting)
    with pytest.raises(ValueError, match="the prompt must hold at least one token"):
        generate(make_model(), torch.empty(0, dtype=torch.int64), 1)
