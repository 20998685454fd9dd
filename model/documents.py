"""Texts as documents that are read piece by piece, so that a folder may be larger than memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model.data import files_of, load_text
from model.english import ENGLISH, english

# Characters of a piece: few enough to hold many, enough for the tokenizer to work on.
PIECE = 1 << 16


@dataclass(frozen=True)
class Document:
    """A text with a name and about so many bytes, read anew at each call of `pieces`."""

    name: str
    size: int
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Scan:
    """What a first reading of documents tells: those that are text, their characters, how many are not, and one hash."""

    documents: list[Document]
    characters: list[int]
    skipped: int
    sha256: str


def documents_of(name: str) -> tuple[list[Document], str]:
    """(documents, description) of what `data=name` means: a file is a document, and so is each file of a folder."""
    path = Path(name).expanduser()
    if path.is_file():
        return [file_document(path)], str(path)
    if path.is_dir():
        return [file_document(file) for file in files_of(path)], str(path)
    if name == "english":
        texts, source = english(), ENGLISH
    else:
        text = load_text(name)
        texts, source = [text.text], text.source
    return [text_document(f"document {i} of {name}", text) for i, text in enumerate(texts)], source


def file_document(path: Path) -> Document:
    """The document that a UTF-8 file is."""

    def read() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from cut_between_words(iter(lambda: file.read(PIECE), ""))

    return Document(str(path), path.stat().st_size, read)


def text_document(name: str, text: str) -> Document:
    """A document that is in memory already."""
    starts = range(0, len(text), PIECE)
    return Document(name, len(text), lambda: cut_between_words(text[i : i + PIECE] for i in starts))


def cut_between_words(pieces: Iterator[str]) -> Iterator[str]:
    """The same text in pieces that end where GPT-2's pattern parts words, so that their tokens are those of the whole.

    A text without such a place in three pieces' length is cut where it is.
    """
    held = ""
    for piece in pieces:
        held += piece
        if place := last_gap(held):
            yield held[:place]
            held = held[place:]
        elif len(held) > 3 * PIECE:
            yield held
            held = ""
    if held:
        yield held


def last_gap(text: str) -> int:
    """The last place where a text can be cut: before a space or after a line break that stands alone; 0 if nowhere.

    The pattern joins a space to the word after it, and looks past a run of white space to see whether a word follows.
    """
    for place in range(len(text) - 2, 0, -1):
        alone = not text[place - 1].isspace() and not text[place + 1].isspace()
        if alone and text[place] == " ":
            return place
        if alone and text[place] == "\n":
            return place + 1
    return 0


def scan(documents: list[Document], strict: bool, seen: Callable[[int], object]) -> Scan:
    """Read all documents once; those that are not UTF-8 are left out, or with strict an error. seen hears of each piece."""
    digest, kept, characters, skipped = hashlib.sha256(), [], [], 0
    for document in documents:
        count, within = 0, digest.copy()
        try:
            for piece in document.pieces():
                within.update(piece.encode("utf-8"))
                count += len(piece)
                seen(len(piece))
        except UnicodeDecodeError as error:
            if strict:
                raise ValueError(
                    f"{document.name} must be UTF-8 text, but it is not ({error}): convert it first"
                ) from None
            skipped += 1
            continue
        if count:
            within.update(b"\0")  # a boundary: the same words in other files are another text
            digest = within
            kept.append(document)
            characters.append(count)
    return Scan(kept, characters, skipped, digest.hexdigest())


def parts(document: Document, cut: int) -> tuple[Iterator[str], Iterator[str]]:
    """The pieces before and from the first line that begins at character `cut` or later; read the first ones first."""
    pieces = iter(document.pieces())
    rest: list[str] = []

    def before() -> Iterator[str]:
        seen = 0
        for piece in pieces:
            if seen + len(piece) > cut:
                place = max(cut - seen, 0)
                place = piece.find("\n", place) + 1 or place
                rest.append(piece[place:])
                yield piece[:place]
                return
            seen += len(piece)
            yield piece

    return before(), itertools.chain(filter(None, rest), pieces)
