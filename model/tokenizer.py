"""Tokenizers: one token a character, or byte-level BPE: trained here, read from a file, or GPT-2's own.

A tokenizer is kept in a checkpoint or beside token shards as text (`state`), and made again from it.

BPE: Sennrich et al. 2016, arXiv 1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners". The merging itself is Hugging Face's package `tokenizers`.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.fetch import is_url, read_place
from model.files import user_path

END_OF_TEXT = "<|endoftext|>"
# vocab.bpe of GPT-2's release and merges.txt of its copies: the same file.
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# A file of merges, and the one of tokens and their numbers that may lie beside it.
VOCABULARIES = {"vocab.bpe": "encoder.json", "merges.txt": "vocab.json"}
MERGES_FILES = tuple(VOCABULARIES)
BYTES = 256


class CharTokenizer:
    """One token a character: the sorted set of a text's characters."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.ids = {c: i for i, c in enumerate(characters)}

    @classmethod
    def of_text(cls, text: str) -> CharTokenizer:
        """The tokenizer that knows exactly a text's characters."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def state(self) -> str:
        """What `restored` makes this tokenizer of."""
        return json.dumps({"characters": self.characters})

    @property
    def description(self) -> str:
        """The vocabulary in words."""
        return f"{len(self)} characters"

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of each token."""
        return [c.encode("utf-8") for c in self.characters]

    @property
    def start(self) -> str:
        """What a text without a prompt begins after: a line break, or the first character where the texts have none."""
        return "\n" if "\n" in self.ids else self.characters[0]

    def encode(self, text: str) -> Tensor:
        """(len(text),) int64; ValueError naming the first character that the vocabulary lacks."""
        try:
            return torch.tensor([self.ids[c] for c in text], dtype=torch.int64)
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} is not in the vocabulary of {len(self)}: "
                f"use only {self.characters!r}, or train on a text that has it"
            ) from None

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens, a 1-d tensor or numbers."""
        return "".join(self.characters[i] for i in numbers(tokens))

    def decoder(self) -> Callable[[int], str]:
        """A function from each next token to the text that it completes."""
        return self.characters.__getitem__

    def byte_count(self, tokens: Tensor) -> int:
        """Bytes of UTF-8 that the tokens stand for."""
        return len(self.decode(tokens).encode("utf-8"))


class BpeTokenizer:
    """Byte-level BPE: every text has tokens, and every token is some bytes; an end-of-text token parts documents."""

    def __init__(self, state: str) -> None:
        """From a tokenizer.json's text; ValueError unless it is byte-level BPE with an end-of-text token."""
        package = tokenizers_package()
        try:
            self.bpe = package.Tokenizer.from_str(state)
            self.pieces = token_bytes(json.loads(state))
        except Exception as error:  # the package raises Exception itself for what it cannot read
            raise ValueError(f"a tokenizer must be a tokenizer.json of byte-level BPE: {error}") from error
        self.bpe.no_truncation()  # which a file may ask for, and a text would silently lose its end by
        self.bpe.no_padding()
        self.state = state
        self.end_of_text = int(self.bpe.token_to_id(END_OF_TEXT))
        self.lengths = torch.tensor([len(piece) for piece in self.pieces])
        self.lengths[self.end_of_text] = 0  # a boundary is no text

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def description(self) -> str:
        """The vocabulary in words."""
        return f"{len(self)} BPE tokens"

    @property
    def start(self) -> str:
        """What a text without a prompt begins after: the end of the one before."""
        return END_OF_TEXT

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, (n,) int64; `<|endoftext|>` written in it is that token."""
        return torch.tensor(self.bpe.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, in which `<|endoftext|>` is as any other word."""
        self.bpe.encode_special_tokens = True
        try:
            return [
                np.array(encoding.ids, dtype=np.int64)
                for encoding in self.bpe.encode_batch_fast(texts, add_special_tokens=False)
            ]
        finally:
            self.bpe.encode_special_tokens = False

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens, a 1-d tensor or numbers; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self.pieces[i] for i in numbers(tokens)).decode("utf-8", errors="replace")

    def decoder(self) -> Callable[[int], str]:
        """A function from each next token to the text that it completes: a character may need several tokens."""
        partial = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: partial.decode(self.pieces[token])

    def byte_count(self, tokens: Tensor) -> int:
        """Bytes of text that the tokens stand for; boundaries of documents are none."""
        return int(self.lengths[tokens].sum())


Tokenizer = CharTokenizer | BpeTokenizer


def numbers(tokens: Tensor | Sequence[int]) -> list[int]:
    """Tokens as Python's integers."""
    return list(tokens.tolist() if isinstance(tokens, Tensor) else tokens)


def restored(state: str) -> Tokenizer:
    """The tokenizer whose `state` this is."""
    content = json.loads(state)
    return CharTokenizer(content["characters"]) if "characters" in content else BpeTokenizer(state)


def tokenizers_package() -> Any:
    """The package `tokenizers`; RuntimeError with the command that installs it."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(
            f"BPE needs the package tokenizers, which cannot be imported ({error}): pip install 'gptkernels[text]'"
        ) from error
    return tokenizers


@functools.cache
def byte_letters() -> str:
    """GPT-2's letter for each byte: itself where it prints, else the next unused one from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(BYTES, 2 * BYTES))
    return "".join(chr(b if b in printing else next(others)) for b in range(BYTES))


def token_bytes(definition: dict[str, Any]) -> list[bytes]:
    """The bytes of each token of a tokenizer.json; ValueError unless they are those of GPT-2's byte-level BPE."""
    model, pre = definition["model"], definition["pre_tokenizer"] or {}
    if model["type"] != "BPE" or pre.get("type") != "ByteLevel":
        raise ValueError(f"got a {model['type']} model after a {pre.get('type')} pre-tokenizer")
    if pre.get("add_prefix_space") or not pre.get("use_regex", True) or definition.get("normalizer"):
        raise ValueError("it adds a space, joins words or changes letters, which GPT-2's does not")
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    special = {token["content"]: token["id"] for token in definition["added_tokens"]}
    if END_OF_TEXT not in special:
        raise ValueError(f"it has no {END_OF_TEXT}")
    pieces = {i: bytes(map(byte_of.__getitem__, text)) for text, i in model["vocab"].items() if text not in special}
    pieces |= {i: text.encode("utf-8") for text, i in special.items()}
    if sorted(pieces) != list(range(len(pieces))):
        raise ValueError("its tokens are not numbered from 0 without a gap")
    return [pieces[i] for i in range(len(pieces))]


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """The BPE of that many tokens, the 256 bytes and the end of text among them, that joins the texts' commonest pairs."""
    if vocabulary <= BYTES + 1:
        raise ValueError(
            f"a BPE vocabulary must hold more than the bytes and {END_OF_TEXT}: over 257, got {vocabulary}"
        )
    package = tokenizers_package()
    bpe = byte_level(package, package.models.BPE())
    letters = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return BpeTokenizer(bpe.to_str())


def bpe_of_merges(text: str) -> BpeTokenizer:
    """The BPE of a merges file in GPT-2's format, with GPT-2's numbers: bytes, merged pairs in order, end of text."""
    pairs = [tuple(line.split(" ")) for line in text.splitlines() if line and not line.startswith("#version")]
    if not pairs or not all(len(pair) == 2 for pair in pairs):
        raise ValueError("a merges file must hold lines of two tokens each, as GPT-2's vocab.bpe does")
    # Printing bytes come first, in GPT-2's numbers.
    letters = sorted(byte_letters(), key=lambda letter: (ord(letter) >= BYTES, ord(letter)))
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in pairs), END_OF_TEXT])}
    package = tokenizers_package()
    bpe = byte_level(package, package.models.BPE(vocab=vocabulary, merges=pairs))
    bpe.add_special_tokens([END_OF_TEXT])
    return BpeTokenizer(bpe.to_str())


def byte_level(package: Any, model: Any) -> Any:
    """A tokenizer that parts a text into words by GPT-2's pattern and spells them in the letters of their bytes."""
    bpe = package.Tokenizer(model)
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    return bpe


def gpt2_bpe(place: str) -> BpeTokenizer:
    """GPT-2's BPE from vocab.bpe or merges.txt: the file, its folder, or its http(s) URL, checked by its sha256."""
    if not is_url(place):
        place = str(merges_file(user_path(place)))
    return bpe_of_merges(read_place(place, GPT2_SHA256, "GPT-2's merges", "gpt2-vocab.bpe"))


def merges_file(path: Path) -> Path:
    """The merges file that a path means, itself or in its folder."""
    if path.is_dir():
        path = next((path / name for name in MERGES_FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise ValueError(
            f"GPT-2's BPE must be vocab.bpe or merges.txt, or a folder with one, got {path}: fetch it first"
        )
    return path


def read_bpe(path: Path) -> BpeTokenizer:
    """The BPE of a tokenizer.json, or of a folder that holds one, such as token shards; else of a merges file."""
    if (path / "tokenizer.json").is_file():
        path /= "tokenizer.json"
    if path.suffix == ".json" and path.is_file():
        return BpeTokenizer(path.read_text(encoding="utf-8"))
    path = merges_file(path)
    bpe = bpe_of_merges(path.read_text(encoding="utf-8"))
    vocabulary = path.with_name(VOCABULARIES.get(path.name, path.name))
    if vocabulary != path and vocabulary.is_file() and read_numbers(vocabulary) != bpe.bpe.get_vocab():
        raise ValueError(
            f"{vocabulary} must number the tokens as GPT-2 does, but other numbers are there: save tokenizer.json"
        )
    return bpe


def read_numbers(path: Path) -> Any:
    """The content of a vocab.json."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
