"""Tokens on disk: a folder of memory-mapped shards with a manifest that knows their sizes and hashes.

    manifest.json    what the tokens are, and of each shard: file, tokens, bytes, sha256
    tokenizer.json   the BPE that made them
    train-00000.bin  ...; val-00000.bin ...   little-endian uint16, or uint32 for more than 65536 tokens, nothing else

A batch is a function of (seed, number of its first window, rank, ranks): an epoch's windows are visited in the order of a
permutation that is computed, not stored, so a resumed run needs no state of the loader but how many it has had, whatever
the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from model.fetch import sha256
from model.files import write_text

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
KEYS = {"source", "characters", "tokenizer_sha256", "dtype", "train", "val"}  # that are read of a manifest
SHARD_TOKENS = 1 << 26
HASH_BYTES = 1 << 24
ROUNDS = 4
# Which of a part's shards to hash: all, or the share of one of several processes that read them together.
ALL = slice(None)


def holds_shards(path: Path) -> bool:
    """Whether a folder is one of token shards, whole or not: others have a manifest.json too."""
    return (path / MANIFEST).is_file() and ((path / TOKENIZER).is_file() or any(path.glob("train-*.bin")))


class ShardWriter:
    """Writes one part, train or val, of a folder that nobody reads yet: tokens go to the disk as they come."""

    def __init__(self, folder: Path, part: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.part, self.dtype, self.shard_tokens = folder, part, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None
        self.digest, self.count = hashlib.sha256(), 0

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens."""
        while len(tokens):
            if self.file is None:
                self.file = (self.folder / self.name).open("wb")
            now = tokens[: self.shard_tokens - self.count]
            data = now.astype(self.dtype).tobytes()
            self.file.write(data)
            self.digest.update(data)
            self.count += len(now)
            tokens = tokens[len(now) :]
            if self.count == self.shard_tokens:
                self.end_shard(self.file)

    @property
    def name(self) -> str:
        """The file of the shard that is being written."""
        return f"{self.part}-{len(self.shards):05d}.bin"

    def end_shard(self, file: IO[bytes]) -> None:
        """Bring a shard to the disk and note it."""
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.close()
        self.shards.append({"file": self.name, "tokens": self.count, "bytes": size, "sha256": self.digest.hexdigest()})
        self.file, self.digest, self.count = None, hashlib.sha256(), 0

    def close(self) -> list[dict[str, Any]]:
        """End the last shard; returns the manifest's entries."""
        if self.file is not None:
            self.end_shard(self.file)
        return self.shards


def token_dtype(vocabulary: int) -> str:
    """The type that a token is stored in."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest: a folder without one is no folder of shards, so this comes last."""
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **content}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest; ValueError where it is not one of ours."""
    try:
        content = dict(json.loads((folder / MANIFEST).read_bytes()))
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} must be a manifest of token shards: {error}: prepare them again"
        ) from error
    if found != FORMAT:
        raise ValueError(f"{folder / MANIFEST} must have format {FORMAT}, got {found}: prepare the shards again")
    if missing := KEYS - content.keys():
        raise ValueError(f"{folder / MANIFEST} must say {', '.join(sorted(missing))}: prepare the shards again")
    return content


def identity(manifest: dict[str, Any]) -> str:
    """The hash of the tokens that a manifest tells of: the same ones made of a text at another place have the same."""
    tokens = {name: manifest[name] for name in ("tokenizer_sha256", "dtype", "train", "val")}
    return sha256(json.dumps(tokens, sort_keys=True).encode())


class Shards:
    """The tokens of a folder's train or val part as one sequence, read where they lie.

    Every shard's size is checked when it is opened, and the hash of those in the slice `hashed`; ValueError naming the one
    that is truncated or changed. Slices and windows are int64 tensors of their own.
    """

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], dtype: str, hashed: slice = ALL) -> None:
        self.arrays = [open_shard(folder / entry["file"], entry, dtype) for entry in entries]
        for entry in entries[hashed]:
            check_shard(folder / entry["file"], entry["sha256"])
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, key: slice) -> Tensor:
        """Consecutive tokens."""
        start, stop, stride = key.indices(len(self))
        if stride != 1:
            raise ValueError(f"token shards are sliced with stride 1, got {stride}")
        return torch.from_numpy(self.read(start, max(stop, start)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, from as many shards as they lie in."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        parts = []
        for array, end in zip(self.arrays[first:], self.ends[first:], strict=True):
            begin = int(end) - len(array)
            if begin >= stop:
                break
            parts.append(array[max(start - begin, 0) : stop - begin].astype(np.int64))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """(len(starts), length): the tokens from each start on."""
        return torch.from_numpy(np.stack([self.read(start, start + length) for start in starts.tolist()]))

    def epoch_starts(self, first: int, batch: int, context: int, seed: int) -> Tensor:
        """Where windows `first` to first + batch of a run begin: every one of the part once an epoch, in an order of its own.

        Windows lie side by side; each epoch moves them all by other tokens, so that their seams are not always the same.
        """
        count = (len(self) - context) // context
        if count < 1:
            raise ValueError(f"token shards must hold at least 2 * context = {2 * context} tokens, got {len(self)}")
        position = np.arange(first, first + batch)
        starts = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(position // count).tolist():
            key = int(sha256(f"{seed} epoch {epoch}".encode())[:16], 16)
            now = position // count == epoch
            starts[now] = permuted(position[now] % count, count, key) * context + key % context
        return torch.from_numpy(starts)


def open_shard(path: Path, entry: dict[str, Any], dtype: str) -> np.ndarray:
    """A shard's tokens, memory-mapped, after a check that it is there and whole."""
    if not path.is_file():
        raise ValueError(f"shard {path} of the manifest is missing: prepare the data again, or copy the whole folder")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ValueError(f"shard {path} must have {entry['bytes']} bytes, got {size}: it is truncated or another file")
    return np.memmap(path, dtype=dtype, mode="r")


def check_shard(path: Path, expected: str) -> None:
    """Raise unless a shard has the sha256 that it was written with."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    if (found := digest.hexdigest()) != expected:
        raise ValueError(f"shard {path} must have sha256 {expected}, got {found}: it is corrupt, prepare it again")


def permuted(index: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(count), chosen by key, takes each index.

    A Feistel network on pairs of half-words permutes the next power of four; an index that it takes outside the range is
    taken on until it is inside, which keeps it a permutation (Black & Rogaway 2002, cycle walking).
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = np.uint64((1 << half) - 1)
    result = np.asarray(index, dtype=np.uint64).copy()
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (scrambled(right, key + turn) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= count
    return result.astype(np.int64)


def scrambled(words: np.ndarray, key: int) -> np.ndarray:
    """A hash of 64-bit words: the finalizer of SplitMix64 (Steele et al. 2014) after the key's own multiple is added."""
    x = words + np.uint64(key * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
