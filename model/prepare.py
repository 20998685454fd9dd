"""`gptkernels data SOURCE --tokenizer ...`: documents of any size to a folder of token shards, in three readings.

The first finds what is text and hashes it, the second trains the BPE on the training part, the third writes the tokens.
Only a few megabytes are held at a time, and the new folder appears when it is whole.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.data import longest_context, shard_dataset
from model.documents import Scan, cuts, documents_of, parts, scan
from model.fetch import sha256
from model.files import LOCK, hold, sync_folder, user_path, write_text
from model.progress import Progress
from model.report import duration
from model.shards import (
    ALL,
    SHARD_TOKENS,
    TOKENIZER,
    ShardWriter,
    holds_shards,
    read_manifest,
    token_dtype,
    write_manifest,
)
from model.tokenizer import BpeTokenizer, gpt2_bpe, read_bpe, tokenizers_package, train_bpe

# Pieces that the tokenizer works on at once.
PIECES = 32
# A BPE learns no more from more text than this; it is taken evenly from all of it.
TRAINING_CHARACTERS = 1 << 28


@dataclass
class Reading:
    """How far a reading of all documents is."""

    progress: Progress
    what: str
    total: int
    done: int = 0
    kept: float = 0.0

    def seen(self, characters: int) -> None:
        """That many more have been read."""
        self.done += characters
        share = min(self.done / max(self.total, 1), 1.0)
        keep = share >= self.kept + 0.25
        self.kept += 0.25 * keep
        figures = {"what": self.what, "size": f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB {share:.0%}"}
        self.progress.update(figures, share, keep)


def prepare(
    source: str,
    tokenizer: str,
    vocabulary: int,
    out: str,
    val_fraction: float,
    *,
    quiet: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Write the token shards of a source and return their folder.

    tokenizer is bpe (trained here, of that vocabulary), gpt2:PLACE, or the path of a tokenizer.json, a merges file or a
    folder with one. The last val_fraction of each document, from a line's beginning on, is for validation; of short ones
    as many whole ones.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"the validation share must be between 0 and 1, got {val_fraction}")
    if holds_shards(user_path(source)):
        raise ValueError(
            f"{source} holds token shards, which are no text: leave --tokenizer out to check and describe them"
        )
    tokenizers_package()
    began = time.perf_counter()
    folder, progress = user_path(out or default_folder(source, tokenizer, vocabulary)), Progress(quiet)
    if folder.exists():
        raise ValueError(f"{folder} is there already: give another --out, or remove it")
    ready = None if tokenizer == "bpe" else chosen_tokenizer(tokenizer)
    documents, description = documents_of(source)
    reading = Reading(progress, "reading", sum(document.size for document in documents))
    found = scan(source, documents, description, reading.seen)
    bpe = ready or trained_tokenizer(found, val_fraction, vocabulary, progress)
    with new_folder(folder) as partial:
        write_text(partial / TOKENIZER, bpe.state)
        shards = write_parts(partial, found, bpe, val_fraction, shard_tokens, progress)
        content = {
            "source": found.source,
            "text_sha256": found.sha256,
            "characters": sum(found.characters),
            "val_fraction": val_fraction,
            "vocabulary": len(bpe),
            "end_of_text": bpe.end_of_text,
            "tokenizer_sha256": sha256(bpe.state.encode("utf-8")),
            "dtype": token_dtype(len(bpe)),
        }
        write_manifest(partial, content | shards)
    progress.note(f"written in {duration(time.perf_counter() - began)}")
    return folder


def default_folder(source: str, tokenizer: str, vocabulary: int) -> str:
    """data/NAME-bpe4096, data/NAME-gpt2."""
    kind = f"bpe{vocabulary}" if tokenizer == "bpe" else tokenizer.partition(":")[0]
    name = f"{Path(source).stem}-{Path(kind).stem}"
    return "data/" + re.sub(r"[^\w.-]", "-", name)


def chosen_tokenizer(name: str) -> BpeTokenizer:
    """GPT-2's BPE, or the one of a file or folder."""
    kind, _, place = name.partition(":")
    return gpt2_bpe(place) if kind == "gpt2" and place else read_bpe(user_path(name))


def trained_tokenizer(found: Scan, val_fraction: float, vocabulary: int, progress: Progress) -> BpeTokenizer:
    """A BPE of the training parts, of every so-manieth piece where there are too many."""
    stride = -(-sum(found.characters) // TRAINING_CHARACTERS)
    reading = Reading(progress, "training the BPE", sum(found.characters))

    def texts() -> Iterator[str]:
        number = 0
        for document, cut in zip(found.documents, cuts(found.characters, val_fraction), strict=True):
            for piece in parts(document, cut)[0]:
                reading.seen(len(piece))
                if number % stride == 0:
                    yield piece
                number += 1

    return train_bpe(texts(), vocabulary)


def write_parts(
    folder: Path, found: Scan, bpe: BpeTokenizer, val_fraction: float, shard_tokens: int, progress: Progress
) -> dict[str, list[dict[str, object]]]:
    """Write the tokens of all documents, an end-of-text token after each one's part; returns the manifest's entries."""
    dtype = token_dtype(len(bpe))
    writers = [ShardWriter(folder, part, dtype, shard_tokens) for part in ("train", "val")]
    reading = Reading(progress, "writing tokens", sum(found.characters))
    for document, cut in zip(found.documents, cuts(found.characters, val_fraction), strict=True):
        for writer, part in zip(writers, parts(document, cut), strict=True):
            encode(part, bpe, writer, reading)
    return {writer.part: writer.close() for writer in writers}


def encode(pieces: Iterator[str], bpe: BpeTokenizer, writer: ShardWriter, reading: Reading) -> None:
    """Write a document's part and its end; nothing where it is empty."""
    empty = True
    while batch := list(itertools.islice(pieces, PIECES)):
        for tokens in bpe.encode_documents(batch):
            empty = empty and not len(tokens)
            writer.add(tokens)
        reading.seen(sum(map(len, batch)))
    if not empty:
        writer.add(np.array([bpe.end_of_text]))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is whole and vanishes otherwise."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with hold(partial):
            for path in partial.iterdir():  # of a process that was killed
                if path.name != LOCK:
                    path.unlink()
            try:
                yield partial
                (partial / LOCK).unlink()
                partial.rename(folder)
                sync_folder(folder.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise RuntimeError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error


def summary(folder: Path, *, written: bool = False) -> str:
    """What a folder of shards holds, after a check of all of it but the hashes of what was just written."""
    data, manifest = shard_dataset(folder, hashed=slice(0) if written else ALL), read_manifest(folder)
    checked = "sizes and hashes checked" if not written else "hashes taken as they were written"
    tokens = len(data.train) + len(data.val)
    lines = [
        ("source", manifest["source"]),
        ("size", f"{manifest['characters']:,} characters, {manifest['characters'] / tokens:.2f} a token"),
        ("vocabulary", data.tokenizer.description),
        ("tokens", f"{len(data.train):,} to train on, {len(data.val):,} to validate"),
        (
            "shards",
            f"{len(manifest['train'])} and {len(manifest['val'])} of {manifest['dtype']}, {checked}",
        ),
        ("sha256", f"{data.sha256} (tokens)"),
    ]
    context = longest_context(data)
    use = f"train on it: gptkernels train PRESET data={folder}, with a context of up to {context:,} tokens"
    if context < 1:
        use = "too small to train on: prepare it from more text, or with another --val-fraction"
    return "\n".join([*(f"{name:<11} {text}" for name, text in lines), "", use])
