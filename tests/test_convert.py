"""Weights from a run, a file or a folder: converted, checked and begun with, they stay the function that they were."""

import json
from dataclasses import replace

import pytest
import torch

from model import cli
from model.checkpoint import BEST, load_model
from model.config import ModelConfig, resolve
from model.hf import write_folder
from model.initial import initial
from model.prepare import prepare
from model.reference import GPT
from model.tokenizer import CharTokenizer, bpe_of_merges, byte_letters, read_bpe, train_bpe
from model.weights_file import EVERY, INDEX, WEIGHTS, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"
MERGES = "#version: 0.2\nĠ t\nĠ a\nh e\nĠt he\n"
CONFIG = ModelConfig(vocab_size=11, context=16, n_layer=2, n_head=8, n_embd=32, act="gelu")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Token shards of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(120)))
    return prepare(str(folder / "text.txt"), "bpe", 300, str(folder / "shards"), 0.1, quiet=True)


@pytest.fixture(scope="module")
def run(tokens, tmp_path_factory):
    """A run of everything that the shapes of its weights do not tell."""
    folder = tmp_path_factory.mktemp("runs")
    own = ["pos=sinusoidal", "act=gelu", "n_head=8", "steps=2", "eval_every=2", "warmup=0", "sample_tokens=0"]
    assert cli.main(["train", "tiny", f"data={tokens}", f"out={folder}", "name=a", *own, "--quiet"]) == 0
    return folder / "a"


@pytest.fixture
def nanogpt(tmp_path):
    """A checkpoint of nanoGPT's, and the model in it."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    torch.save({"model": model.state_dict(), "model_args": {"n_head": 8}, "iter_num": 3}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", model


def same_function(a, b, vocabulary=11):
    idx = torch.arange(16)[None] % vocabulary
    return torch.equal(a(idx)[0], b(idx)[0])


def begun(place, tokenizer, *settings):
    return initial(resolve("", [f"init={place}", "context=16", *settings])[0], tokenizer)


@pytest.mark.parametrize("name", ["", BEST])
def test_a_run_is_the_same_function_in_a_file(run, tmp_path, capsys, name):
    trained, _, config = load_model(run)
    assert (config.model.words, config.model.vocab_size) == (300, 320)
    path = tmp_path / "w.safetensors"
    assert cli.main(["convert", str(run / name), str(path)]) == 0 and "300 tokens" in capsys.readouterr().out
    found, shape = load_weights(path, [], EVERY)
    assert same_function(found, trained.to_reference(), 300)
    assert shape.model == replace(config.model, vocab_size=300, words=0)
    assert cli.main(["check", str(path), "--steps", "1", "--band", "2"]) == 0


def test_a_checkpoint_file_is_its_run(run, tokens, capsys):
    trained, tokenizer, config = load_model(run)
    shape, weights = begun(run / BEST, tokenizer)
    assert shape == replace(config.model, context=16)
    model = GPT(shape)
    model.load_state_dict(weights)
    assert same_function(model, trained.to_reference(), 300)
    assert cli.main(["check", str(run / BEST), "--steps", "1", "--band", "2"]) == 0
    assert f"tokens in {tokens}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must have the 300 tokens"):
        begun(run / BEST, CharTokenizer("".join(map(chr, range(310)))))
    others = (
        CharTokenizer("".join(map(chr, range(300)))),
        train_bpe([f"Call me {i}th Ishmael." for i in range(999)], 300),
    )
    for other in others:
        with pytest.raises(ValueError, match=rf"must have the tokens of .*best.pt, got other {other.description}"):
            begun(run / BEST, other)


def test_a_torch_file_that_is_no_run_is_converted(nanogpt, tmp_path):
    path, model = nanogpt
    assert cli.main(["convert", str(path), str(tmp_path / "a.safetensors")]) == 0
    assert same_function(load_weights(tmp_path / "a.safetensors", [])[0], model)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    words = ["convert", str(tmp_path / "plain.pt"), str(tmp_path / "b.safetensors"), "n_head=8", "act=gelu"]
    assert cli.main(words) == 0
    assert same_function(load_weights(tmp_path / "b.safetensors", [])[0], model)


def test_the_heads_of_a_file_are_its_own(nanogpt, tmp_path):
    path, model = nanogpt
    letters = CharTokenizer("abcdefghijk")
    own = replace(model.config, words=11)
    assert begun(path, letters)[0] == own
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert begun(tmp_path / "plain.pt", letters, "n_head=2", "act=gelu")[0] == replace(own, n_head=2)
    for said in ("n_head=4", "n_layer=4", "pos=none", "bias=off", "tie=off", "n_embd=64", "act=gelu_tanh"):
        with pytest.raises(ValueError, match=rf"{said.partition('=')[0]} must be .*, as in init=.*ckpt.pt, got "):
            begun(path, letters, said)
    assert begun(path, letters, "n_layer=2", "dropout=0.1")[0] == replace(own, dropout=0.1)
    # A preset's shape is not said: it gives way.
    assert initial(resolve("tiny", [f"init={path}"])[0], letters)[0].n_head == 8


def test_weights_in_lora_s_parts_are_said(tmp_path):
    name = "transformer.h.0.attn.c_attn.parametrizations.weight.original"
    torch.save({name: torch.zeros(3, 1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"merge them with  gptkernels convert RUN"):
        load_weights(tmp_path / "w.pt", ["n_head=1"])


def test_data_of_other_tokens_is_refused(tmp_path):
    ours, other = train_bpe([TEXT], 270), train_bpe(["Call me Ishmael, and call him Ahab. " * 9], 270)
    place = f"hf:{tmp_path / 'gpt2'}"
    write_folder(tmp_path / "gpt2", GPT(replace(CONFIG, vocab_size=270)), ours)
    assert begun(place, ours)[0].words == 270
    with pytest.raises(ValueError, match=r"must have the tokens of hf:.*got other 270 BPE tokens"):
        begun(place, other)
    with pytest.raises(ValueError, match=r"must have the tokens of hf:.*got other 260 characters"):
        begun(place, CharTokenizer("".join(map(chr, range(260)))))
    (tmp_path / "gpt2" / "tokenizer.json").unlink()
    for tokenizer in (other, CharTokenizer("".join(map(chr, range(270))))):
        assert begun(place, tokenizer)[0].words == 270  # nothing tells


def test_a_folder_of_several_files_is_not_written_over(tmp_path):
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="holds a model already"):
        write_folder(tmp_path, GPT(CONFIG), None)
    assert not (tmp_path / WEIGHTS).exists()


def test_a_tokenizer_of_merges_goes_along(tmp_path, capsys):
    source, bpe = tmp_path / "source", bpe_of_merges(MERGES)
    write_folder(source, GPT(replace(CONFIG, vocab_size=len(bpe))), None)
    assert cli.main(["convert", f"hf:{source}", f"hf:{tmp_path / 'none'}"]) == 0
    assert "no tokenizer: the source has none" in capsys.readouterr().out
    (source / "merges.txt").write_text(MERGES, encoding="utf-8")
    assert cli.main(["convert", f"hf:{source}", f"hf:{tmp_path / 'out'}"]) == 0
    assert "its tokenizer" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == bpe.state


def test_a_vocabulary_beside_merges_must_be_theirs(tmp_path):
    bpe = bpe_of_merges(MERGES)
    numbers = {token: i for i, token in enumerate([*byte_letters(), "Ġt", "Ġa", "he", "Ġthe", "<|endoftext|>"])}
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(bpe.bpe.get_vocab()), encoding="utf-8")
    assert read_bpe(tmp_path).state == bpe.state
    (tmp_path / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    for place in (tmp_path, tmp_path / "merges.txt"):
        with pytest.raises(ValueError, match=r"vocab.json must number .*: save tokenizer.json"):
            read_bpe(place)
