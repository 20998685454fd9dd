"""From a text or token shards to batches: sources, train and validation split, random and complete windows.

A batch is a function of (seed, step), of shards of (seed, number of its first window), so a resumed run sees exactly the
batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.documents import documents_of, scan
from model.fetch import sha256
from model.files import user_path
from model.shards import ALL, TOKENIZER, Shards, holds_shards, identity, read_manifest
from model.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer, read_bpe

# A GPU multiplies by a table of so many rows, or a multiple, in whole tiles.
TILE = 64
# By fewer rows a table may be padded: a larger difference is another vocabulary.
MOST_PADDING = 128


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
    """The text that `data=name` means, its documents parted by a line break."""
    found = scan(name, *documents_of(name))
    text = "\n".join("".join(document.pieces()) for document in found.documents)
    return Text(text, found.source, sha256(text.encode("utf-8")))


def load_dataset(
    name: str,
    val_fraction: float,
    context: int,
    tokenizer: Tokenizer | None = None,
    expected: str | None = None,
    hashed: slice = ALL,
) -> Dataset:
    """The text `name` as tokens, its last part for validation; or a folder of token shards, which has its own split.

    An earlier run's tokenizer is used if given; expected is the sha256 that the text must have, if any; hashed are the
    shards to check by their hashes.
    """
    if holds_shards(folder := user_path(name)):
        data = shard_dataset(folder, expected, hashed)
    elif isinstance(tokenizer, BpeTokenizer):
        raise ValueError(f"data must be the token shards that the run was trained on, got {name}: name their folder")
    else:
        data = character_dataset(name, val_fraction, tokenizer, expected)
    if tokenizer is not None and tokenizer.state != data.tokenizer.state:
        raise ValueError(f"{name} must have the run's own tokenizer, {tokenizer.description}, got another one")
    for part, what in ((data.train, "training"), (data.val, "validation")):
        # An epoch of shards moves its windows by up to one of them.
        least = max(2 * context, context + 2) if isinstance(part, Shards) and part is data.train else context + 2
        if len(part) < least:
            raise ValueError(
                f"the {what} part must hold at least {least} tokens for context={context}, got {len(part)} of {name}: "
                "give a longer text, a smaller context, or another val_fraction"
            )
    return data


def longest_context(data: Dataset) -> int:
    """The longest context for which load_dataset finds a folder of shards large enough; below 1 where there is none."""
    return min(len(data.train) // 2, len(data.train) - 2, len(data.val) - 2)


def character_dataset(name: str, val_fraction: float, tokenizer: Tokenizer | None, expected: str | None) -> Dataset:
    """A text as characters, numbered by an earlier run's tokenizer if given."""
    text = load_text(name)
    check_unchanged(expected, text.sha256, text.source)
    tokenizer = tokenizer or CharTokenizer.of_text(text.text)
    tokens = tokenizer.encode(text.text)
    # nanoGPT's rounding of the split: int(0.9 n) characters to train on.
    cut = int(len(tokens) * (1.0 - val_fraction))
    return Dataset(tokens[:cut], tokens[cut:], tokenizer, text.source, text.sha256)


def shard_dataset(folder: Path, expected: str | None = None, hashed: slice = ALL) -> Dataset:
    """The tokens of a folder of shards, checked against the manifest, the hashes of those in the slice."""
    manifest = read_manifest(folder)
    digest = identity(manifest)
    source = f"{manifest['source']}, tokens in {folder}"
    check_unchanged(expected, digest, source)
    tokenizer = read_bpe(folder / TOKENIZER)
    if sha256(tokenizer.state.encode("utf-8")) != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"{folder / TOKENIZER} must be the tokenizer that made the shards, got another one: restore it"
        )
    train, val = (Shards(folder, manifest[part], manifest["dtype"], hashed) for part in ("train", "val"))
    return Dataset(train, val, tokenizer, source, digest)


def with_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A model's configuration for a tokenizer: its tokens are the words, and a large table is padded to whole tiles."""
    words = len(tokenizer)
    if not config.words and config.vocab_size - MOST_PADDING >= words:
        raise ValueError(
            f"vocab_size must be the data's {words} tokens, or fewer than {MOST_PADDING} more rows, got {config.vocab_size}: "
            "name the text or the token shards that it is for with data=, or give vocab_size=0"
        )
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
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, both (batch / ranks, context), the targets one token further: a rank's equal share.

    The windows of all ranks together are the same however many there are: at random places, but of shards in training
    each one once an epoch. Earlier steps of another batch have taken `offset` windows more than as many of this one.
    """
    if batch % ranks:
        raise ValueError(f"batch must be a multiple of the {ranks} ranks, got {batch}: change one of them")
    if isinstance(tokens, Shards) and stream == "train":
        starts = tokens.epoch_starts(offset + step * batch, batch, context, seed)
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
