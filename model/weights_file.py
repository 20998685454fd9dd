"""Weights from elsewhere: a state_dict in a .safetensors or a torch file, or a folder that transformers saved a GPT-2 in."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from model.config import Config, build, parse_override
from model.files import write_atomically
from model.reference import GPT

# The types of a safetensors header that weights come in.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What compiling and wrapping put before a name.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)+")
# Causal masks that old GPT-2 files hold beside the weights.
MASK = re.compile(r"\.attn\.(masked_)?bias$")
# GPT-2's own files hold these (in, out), nn.Linear is (out, in).
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Tokens and sequences to check on unless told otherwise: attention written out in float64 needs B H T T numbers a layer.
TOKENS, SEQUENCES = 128, 2
# As many positions as there are.
EVERY = 1 << 30


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, other settings) of a file or a folder of GPT-2's; it can hold no code."""
    if path.is_dir():
        from model.hf import read_folder  # it reads its tensors with this module

        return read_folder(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path} must hold a state_dict that torch.load(weights_only=True) takes, got {type(error).__name__}: save "
            "model.state_dict() alone"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}: save model.state_dict()")
    settings = settings_of(content)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, settings


def settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint, ours or nanoGPT's, says beside its weights: n_head and act. nanoGPT's GELU is the exact one."""
    ours, nanogpt = content.get("config"), content.get("model_args")
    if isinstance(ours, dict):
        found = {name: ours.get(f"model.{name}") for name in ("n_head", "act")}
    elif isinstance(nanogpt, dict):
        found = {"n_head": nanogpt.get("n_head"), "act": "gelu"}
    else:
        found = {}
    return {f"model.{name}": value for name, value in found.items() if value is not None}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: eight bytes of length, a JSON header of so many bytes, then the numbers."""
    try:
        # Mapped and private: a large file is not held twice, and never written to.
        data = np.memmap(path, dtype=np.uint8, mode="c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
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
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a .safetensors file, atomically and one at a time; those of one storage are written each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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


def named_as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as float32 under the reference's names and in its layout."""
    found = {PREFIX.sub("", name): value for name, value in tensors.items()}
    found = {name: value.float() for name, value in found.items() if not MASK.search(name)}
    if "wte.weight" in found:
        found = {name if name.startswith("lm_head.") else f"transformer.{name}": v for name, v in found.items()}
    c_attn = found.get("transformer.h.0.attn.c_attn.weight")
    if c_attn is None or c_attn.dim() != 2 or "transformer.wte.weight" not in found:
        raise ValueError(
            "a state_dict must have GPT-2's names (transformer.wte.weight, transformer.h.0.attn.c_attn.weight, ...), "
            f"got {', '.join(sorted(found)[:4]) or 'no tensor'}: rename its keys"
        )
    if c_attn.shape[1] == 3 * c_attn.shape[0]:
        found = {name: v.T.contiguous() if name.endswith(TURNED) else v for name, v in found.items()}
    return found


def config_of(weights: dict[str, Tensor], settings: dict[str, Any], overrides: Sequence[str], tokens: int) -> Config:
    """The configuration that the shapes tell; what they do not (n_head, act) comes from the file or the command line."""
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    positions = weights.get("transformer.wpe.weight")
    head = weights.get("lm_head.weight")
    chosen: dict[str, Any] = {
        "model.vocab_size": vocab_size,
        "model.n_embd": n_embd,
        "model.n_layer": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.h.")),
        "model.bias": "transformer.ln_f.bias" in weights,
        "model.context": TOKENS if positions is None else min(tokens, positions.shape[0]),
        "model.pos": "none" if positions is None else "learned",
        "model.tie": head is None or torch.equal(head, weights["transformer.wte.weight"]),
        "train.batch": SEQUENCES,
    }
    chosen |= settings | dict(map(parse_override, overrides))
    if "model.n_head" not in chosen:
        raise ValueError(
            f"shapes do not tell how many heads there are: add n_head= (heads 64 wide: {n_embd // 64 or 1})"
        )
    return build(chosen)


def load_weights(path: Path, overrides: Sequence[str], tokens: int = TOKENS) -> tuple[GPT, Config]:
    """The reference model of a state_dict file or a GPT-2 folder, with as many positions as the configuration's context.

    tokens is the most positions to take where the overrides give no context.
    """
    tensors, settings = read_tensors(path)
    weights = named_as_ours(tensors)
    config = config_of(weights, settings, overrides, tokens)
    if (positions := weights.get("transformer.wpe.weight")) is not None:
        if config.model.context > len(positions):
            raise ValueError(
                f"context must be at most the file's {len(positions)} positions, got {config.model.context}"
            )
        weights["transformer.wpe.weight"] = positions[: config.model.context].contiguous()
    if config.model.tie:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model = GPT(config.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {config.model}: {reason}") from error
    return model, config
