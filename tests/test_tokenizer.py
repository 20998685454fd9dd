"""BPE: every text comes back, pieces are cut where words part, GPT-2's numbers from its merges, and what is no BPE."""

import builtins
import json
import random

import pytest
import torch

from model import cli, fetch, tokenizer
from model.documents import cut_between_words, parts, text_document
from model.tokenizer import END_OF_TEXT, BpeTokenizer, CharTokenizer, bpe_of_merges, byte_letters, restored, train_bpe

TEXT = "It's the first day; they'd say: “schön”, 世界!\n\n  indented   twice\n\tand 42 tabs \n\n\n" * 20
ALPHABET = " \n\t ab'st1é.世\u00a0"
# Enough merges for one word, in GPT-2's own first ones.
MERGES = "#version: 0.2\nĠ t\nĠ a\nh e\nĠt he\n"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT], 300)


def encoded(bpe, text):
    return bpe.encode_documents([text])[0].tolist()


def test_every_text_comes_back(bpe):
    for text in (TEXT, "never seen: ßΩ🙂\0\r\n", ""):
        tokens = torch.tensor(encoded(bpe, text), dtype=torch.int64)
        assert bpe.decode(tokens) == bpe.decode(tokens.tolist()) == text and bpe.byte_count(tokens) == len(
            text.encode("utf-8")
        )
        write = bpe.decoder()
        assert "".join(map(write, tokens.tolist())) == text
    assert len(bpe) == 300 and len(encoded(bpe, TEXT)) < 0.5 * len(TEXT)


def test_end_of_text_is_a_token_only_where_it_is_asked_for(bpe):
    assert bpe.encode(f"a{END_OF_TEXT}").tolist()[-1] == bpe.end_of_text
    assert bpe.end_of_text not in encoded(bpe, f"a{END_OF_TEXT}b")
    ended = bpe.encode(f"day{END_OF_TEXT}")
    assert bpe.decode(ended) == f"day{END_OF_TEXT}" and bpe.byte_count(ended) == 3
    assert bpe.encode(bpe.start).tolist() == [bpe.end_of_text]


def test_training_is_repeatable_and_a_tokenizer_is_its_state(bpe):
    assert train_bpe([TEXT], 300).state == bpe.state
    for one in (bpe, CharTokenizer.of_text(TEXT)):
        again = restored(one.state)
        assert again.state == one.state and torch.equal(again.encode("the day"), one.encode("the day"))


@pytest.mark.parametrize("piece", [3, 7, 64])
def test_pieces_have_the_tokens_of_the_whole(bpe, monkeypatch, piece):
    monkeypatch.setattr("model.documents.PIECE", piece)
    rng = random.Random(piece)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 60))) for _ in range(300)]
    for text in [*texts, TEXT]:
        pieces = list(cut_between_words(text[i : i + piece] for i in range(0, len(text), piece)))
        assert "".join(pieces) == text
        if all(len(p) <= 3 * piece for p in pieces):  # else it was cut inside a word
            assert [t for p in pieces for t in encoded(bpe, p)] == encoded(bpe, text), pieces


@pytest.mark.parametrize("cut", [0, 1, 40, 41, 500, 10_000])
def test_a_document_is_parted_at_a_line(monkeypatch, cut):
    monkeypatch.setattr("model.documents.PIECE", 16)
    text = "".join(f"line number {i}\n" for i in range(40))
    before, after = ("".join(part) for part in parts(text_document("t", text), cut))
    assert before + after == text and len(before) >= min(cut, len(text)) and (not after or before.endswith("\n"))


def test_gpt2s_numbers_from_its_merges():
    bpe = bpe_of_merges(MERGES)
    assert len(bpe) == 256 + 4 + 1 and bpe.end_of_text == 260
    # GPT-2's table: "!" is 0, "\n" 198, " " 220; then the merges in their order.
    assert bpe.encode("!\n ").tolist() == [0, 198, 220]
    assert bpe.encode(" the he").tolist() == [259, 220, 258]
    assert bpe.encode(f" a{END_OF_TEXT}").tolist() == [257, 260]
    assert len(set(byte_letters())) == 256 and byte_letters()[ord(" ")] == "Ġ" and byte_letters()[0] == "Ā"


def test_gpt2s_own_file_is_checked_by_its_hash(tmp_path, monkeypatch):
    (tmp_path / "vocab.bpe").write_text(MERGES, encoding="utf-8")
    with pytest.raises(ValueError, match=r"GPT-2's merges at .* must have sha256 1ce1664773c5"):
        tokenizer.gpt2_bpe(str(tmp_path))
    monkeypatch.setattr(tokenizer, "GPT2_SHA256", fetch.sha256(MERGES.encode("utf-8")))
    for place in (tmp_path, tmp_path / "vocab.bpe"):
        assert tokenizer.gpt2_bpe(str(place)).state == bpe_of_merges(MERGES).state
    with pytest.raises(ValueError, match=r"must be vocab.bpe or merges.txt, .* got .*nowhere"):
        tokenizer.gpt2_bpe(str(tmp_path / "nowhere"))


def test_a_file_that_cuts_or_pads_does_neither_here(bpe):
    bpe.bpe.enable_truncation(4)
    bpe.bpe.enable_padding(length=9)
    cutting = BpeTokenizer(bpe.bpe.to_str())
    bpe.bpe.no_truncation()
    bpe.bpe.no_padding()
    for text in (TEXT, "a"):
        assert cutting.encode(text).tolist() == encoded(cutting, text) == encoded(bpe, text)


def test_what_is_no_byte_level_bpe_is_said(bpe, tmp_path):
    good = json.loads(bpe.state)
    spaced = good | {"pre_tokenizer": {"type": "Whitespace"}}
    endless = good | {"added_tokens": []}
    for bad, message in (
        ("{", "byte-level BPE"),
        (json.dumps(spaced), "Whitespace"),
        (json.dumps(endless), END_OF_TEXT),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            BpeTokenizer(bad)
    with pytest.raises(ValueError, match="over 257, got 200"):
        train_bpe([TEXT], 200)
    with pytest.raises(ValueError, match="lines of two tokens"):
        bpe_of_merges("#version: 0.2\na b c\n")


def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys, tmp_path):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["data", "python", "--tokenizer", "bpe", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "pip install 'gptkernels[text]'" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
