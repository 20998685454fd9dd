"""The tensors of a checkpoint in parts: each rank writes what it holds, through torch.distributed.checkpoint.

The folder is in that library's own format, which any number of ranks reads, each what it needs. No rank ever holds the
whole. The folder's index is a pickle, which could call any function when it is read: here it can name nothing but the few
records that an index of tensors is made of. The tensors are read with weights_only.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from model.files import disk_error, sync_folder
from model.ranks import Ranks

LIBRARY = "torch.distributed.checkpoint"
# No BytesStorageMetadata: the library would unpickle what such an entry stands for.
RECORDS = {
    (f"{LIBRARY}.metadata", "Metadata"),
    (f"{LIBRARY}.metadata", "TensorStorageMetadata"),
    (f"{LIBRARY}.metadata", "TensorProperties"),
    (f"{LIBRARY}.metadata", "ChunkStorageMetadata"),
    (f"{LIBRARY}.metadata", "MetadataIndex"),
    (f"{LIBRARY}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{LIBRARY}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
}


# What reading a damaged index raises.
BROKEN = (pickle.UnpicklingError, OSError, EOFError, LookupError, TypeError, AttributeError, ValueError)


class Index(pickle.Unpickler):
    """A reader of an index that can make its records and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of a record; UnpicklingError for any other name."""
        if (module, name) not in RECORDS:
            raise pickle.UnpicklingError(f"an index of tensors must not name {module}.{name}")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """The library's reader, but for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            return cast("Metadata", Index(file).load())


class Writer(FileSystemWriter):
    """The library's writer, which says why a disk did not take the data, and not where the run lay."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's part."""
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            raise disk_error(error) or error from error

    def storage_meta(self) -> None:
        """Nothing: it would be a path, and an index needs none."""


def write_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors, of which each rank has a part or the same, into an empty folder; on the disk when this returns.

    RuntimeError, on every rank, where the disk of any does not take it.
    """
    try:
        save_parts(dict(tensors), storage_writer=Writer(folder, overwrite=False))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, Exception):
            raise reason from error  # a Ctrl-C
        raise RuntimeError(
            f"cannot write {folder}: {getattr(reason, 'strerror', None) or reason}: make room there or choose another "
            "out= (the checkpoint that was there before is whole)"
        ) from error
    if ranks.first:
        sync_folder(folder)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """ValueError with the folder's name for what goes wrong in reading it."""
    try:
        with warnings.catch_warnings():
            # Each rank reads on its own, as the library is asked to: it warns of it.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except (CheckpointException, *BROKEN) as error:
        reason = next((one[0] for one in getattr(error, "failures", {}).values()), error)
        if not isinstance(reason, Exception):
            raise reason from error  # a Ctrl-C
        raise ValueError(
            f"{folder} must be whole, the tensors of the checkpoint beside it, but it cannot be read "
            f"({type(reason).__name__}: {reason}): copy the run folder again"
        ) from error


def index_of(folder: Path) -> dict[str, Any]:
    """Size and dtype of each tensor in a folder, by its name."""
    with readable(folder):
        return Reader(folder).read_metadata().state_dict_metadata


def read_parts(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors of these names from a folder, where ranks hold parts each its own."""
    with readable(folder):
        load_parts(dict(into), storage_reader=Reader(folder), no_dist=True)


def read_whole(folder: Path, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a folder whose names begin with one of these words, whole."""
    found = {name: entry for name, entry in index_of(folder).items() if name.partition(".")[0] in kinds}
    tensors = {name: torch.empty(entry.size) for name, entry in found.items()}
    read_parts(folder, tensors)
    return tensors
