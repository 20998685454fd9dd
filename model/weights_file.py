"""Weights from elsewhere: a state_dict in a .safetensors or a torch file, or a folder that transformers saved a GPT-2 in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from model.config import Config, ModelConfig, build, parse_override, parse_value
from model.reference import GPT
from model.safetensors_file import read_safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# GPT-2's names of the activations that we have, and what it computes beside its shape.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
FUNCTION = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# What compiling and wrapping put before a name.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)+")
# Causal masks that old GPT-2 files hold beside the weights.
MASK = re.compile(r"\.attn\.(masked_)?bias$")
# GPT-2's own files hold these (in, out), nn.Linear is (out, in).
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What decides the function and no shape tells: our files say it.
TOLD = ("model.n_head", "model.act", "model.pos", "model.context")
# What must be said where they do not, for one of them two functions have the same weights.
UNTOLD = {
    "model.n_head": "n_head= (heads 64 wide: {})",
    "model.act": "act= (gelu_tanh is GPT-2's, gelu the exact one)",
    "model.pos": "pos= (sinusoidal or none: there is no table)",
}
# Tokens and sequences to check on unless told otherwise: attention written out in float64 needs B H T T numbers a layer.
TOKENS, SEQUENCES = 128, 2
# As many positions as there are.
EVERY = 1 << 30


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, other settings) of a file or a folder of GPT-2's; it can hold no code."""
    if not path.exists():
        raise ValueError(f"weights must be in a file, or in the folder of a saved GPT-2, got {path}: there is none")
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return tensors, {name: parse_value(name, metadata[name]) for name in TOLD if name in metadata}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle it raises whatever they come to: KeyError, IndexError
        raise ValueError(
            f"{path} must hold a state_dict that torch.load(weights_only=True) takes, got {type(error).__name__}: save "
            "model.state_dict() alone"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}: save model.state_dict()")
    if isinstance(content.get("parts"), str):
        from model.checkpoint import load  # which reads files with this module

        content = load(path, tensors=("model",))
    settings = settings_of(content)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, settings


def settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint, ours or nanoGPT's, says beside its weights. nanoGPT's GELU is the exact one."""
    ours, nanogpt = content.get("config"), content.get("model_args")
    if isinstance(ours, dict):
        found = {name: ours.get(name) for name in (*TOLD, "model.words")}
    elif isinstance(nanogpt, dict):
        found = {"model.n_head": nanogpt.get("n_head"), "model.act": "gelu"}
    else:
        found = {}
    return {name: value for name, value in found.items() if value is not None}


def told(config: ModelConfig) -> dict[str, str]:
    """What a .safetensors file says of its function, as metadata."""
    return {name: str(getattr(config, name.removeprefix("model."))) for name in TOLD}


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by their names there, the settings that their shapes do not tell) of a folder with GPT-2's files."""
    index = folder / INDEX
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    if (folder / "config.toml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a run: name the checkpoint in it to begin with, {folder / 'best.pt'}")
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, but it does not: save the model as safetensors there")
        tensors |= read_safetensors(folder / name)[0]
    return tensors, gpt2_settings(read_json(folder / "config.json"), folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file of a saved GPT-2, but there is none: name the folder that has it")
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def gpt2_settings(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Our settings of a config.json; ValueError for a model that is another function than ours."""
    wanted = FUNCTION | {"n_inner": (None, 4 * content.get("n_embd", 0)), "activation_function": tuple(ACTIVATIONS)}
    for name, right in wanted.items():
        # What a config.json leaves out has GPT-2's value; only model_type must be there.
        found = content.get(name, "" if name == "model_type" else right)
        if found != right and not (isinstance(right, tuple) and found in right):
            raise ValueError(f"{folder} must hold a GPT-2 with {name} {right}, got {found!r}: it is another function")
    activation = content.get("activation_function", "gelu_new")
    return {"model.n_head": content.get("n_head", 12), "model.act": ACTIVATIONS[activation]}


def named_as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as float32 under the reference's names and in its layout."""
    found = {PREFIX.sub("", name): value for name, value in tensors.items()}
    found = {name: value.float() for name, value in found.items() if not MASK.search(name)}
    if "wte.weight" in found:
        found = {name if name.startswith("lm_head.") else f"transformer.{name}": v for name, v in found.items()}
    if any(".parametrizations." in name for name in found):
        raise ValueError("weights must not be parted by LoRA: merge them with  gptkernels convert RUN FILE.safetensors")
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
    """The configuration that the shapes tell; what they do not comes from the settings and, over them, the overrides."""
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    positions = weights.get("transformer.wpe.weight")
    head = weights.get("lm_head.weight")
    chosen: dict[str, Any] = {
        "model.vocab_size": vocab_size,
        "model.n_embd": n_embd,
        "model.n_layer": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.h.")),
        "model.bias": "transformer.ln_f.bias" in weights,
        # Without a table there is no last position, only the longest text that the model has seen.
        "model.context": min(tokens, settings.get("model.context", TOKENS) if positions is None else len(positions)),
        "model.tie": head is None or torch.equal(head, weights["transformer.wte.weight"]),
        "train.batch": SEQUENCES,
    } | ({} if positions is None else {"model.pos": "learned"})
    by_shape = {"model.context"} if positions is None else {"model.context", "model.pos"}
    chosen |= {name: value for name, value in settings.items() if name not in by_shape}
    chosen |= dict(map(parse_override, overrides))
    if untold := [words.format(n_embd // 64 or 1) for name, words in UNTOLD.items() if name not in chosen]:
        raise ValueError(f"shapes do not tell what the model computes: add {', '.join(untold)}")
    return build(chosen)


def load_weights(
    path: Path, overrides: Sequence[str], tokens: int = TOKENS, defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[GPT, Config]:
    """The reference model of a state_dict file or a GPT-2 folder, with as many positions as the configuration's context.

    tokens is the most positions to take where the overrides give no context; defaults hold for what the file does not say.
    """
    tensors, settings = read_tensors(path)
    weights = named_as_ours(tensors)
    config = config_of(weights, {**defaults, **settings}, overrides, tokens)
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
