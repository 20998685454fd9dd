"""The .safetensors format: eight bytes of length, a JSON header of so many bytes, then the numbers. Its package is not needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from model.files import write_atomically

# The types of a safetensors header that weights come in.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a .safetensors file, the metadata as it was written."""
    try:
        # Mapped and private: a large file is not held twice, and never written to.
        data = np.memmap(path, dtype=np.uint8, mode="c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                continue  # a mask, which is no weight
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
            if end - begin != math.prod(shape) * dtype.itemsize or start + end > len(data):
                raise ValueError(f"{name} has {end - begin} bytes of {len(data) - start} for shape {shape}")
            empty = torch.empty(shape, dtype=dtype)
            tensors[name] = (
                torch.frombuffer(data, dtype=dtype, count=empty.numel(), offset=start + begin).view(shape).clone()
                if empty.numel()
                else empty
            )
        return tensors, metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors as a .safetensors file, atomically and one at a time; those of one storage are written each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the numbers are aligned

    def write(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    write_atomically(path, write)
