"""GPT-2 as Hugging Face's transformers keep it: config.json, model.safetensors, tokenizer.json. transformers is not needed.

What differs is the layout alone: Conv1D holds a projection's weight (in, out), nn.Linear (out, in); every layer has a bias
and every model a table of positions. A model of ours without them has zeros there, which is the same function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Config, ModelConfig
from model.data import MOST_PADDING
from model.fast import FastGPT
from model.files import user_path, write_text
from model.reference import GPT, sinusoidal_positions
from model.safetensors_file import write_safetensors
from model.tokenizer import END_OF_TEXT, MERGES_FILES, BpeTokenizer, Tokenizer, read_bpe
from model.weights_file import ACTIVATIONS, EVERY, FUNCTION, INDEX, TURNED, WEIGHTS, load_weights

PREFIX = "hf:"


def folder_of(place: str) -> Path:
    """The path of hf:PLACE, or of PLACE itself."""
    return user_path(place.removeprefix(PREFIX))


def load_hf(place: str, backend: str = "auto") -> tuple[FastGPT, BpeTokenizer, Config]:
    """The fast model of hf:FOLDER in eval mode, with all its positions, its tokenizer and its configuration."""
    folder = folder_of(place)
    model, config = load_weights(folder, [], EVERY)
    tokenizer = read_tokenizer(folder)
    config = replace(config, model=fitted(config.model, tokenizer, place))
    model.config = config.model
    return FastGPT.from_reference(model, backend=backend).eval(), tokenizer, config


def fitted(config: ModelConfig, tokenizer: Tokenizer, place: str) -> ModelConfig:
    """The configuration of a checkpoint for the data's tokenizer; ValueError where it has another vocabulary."""
    rows, words = config.vocab_size, len(tokenizer)
    if words != config.words and (config.words or not rows - MOST_PADDING < words <= rows):
        raise ValueError(
            f"data must have the {config.outputs} tokens of {place}, got {tokenizer.description}: make token shards of it with "
            "gptkernels data SOURCE --tokenizer, naming that model's tokenizer.json or gpt2:vocab.bpe"
        )
    return replace(config, words=words)


def own_tokenizer(folder: Path) -> BpeTokenizer | None:
    """The BPE in a folder, None where there is none."""
    names = ("tokenizer.json", *MERGES_FILES)
    return read_bpe(folder) if any((folder / name).is_file() for name in names) else None


def read_tokenizer(folder: Path) -> BpeTokenizer:
    """The BPE in a folder; ValueError where there is none."""
    if (tokenizer := own_tokenizer(folder)) is None:
        raise ValueError(f"{folder} must hold a tokenizer.json or {' or '.join(MERGES_FILES)}: copy the model's there")
    return tokenizer


def plain_tensors(model: GPT) -> dict[str, Tensor]:
    """The model's tensors, the padding of its table left out, and a tied one written once."""
    tensors = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: model.config.outputs]
    if model.config.tie:
        del tensors["lm_head.weight"]
    return tensors


def as_gpt2(model: GPT) -> dict[str, Tensor]:
    """The model's plain tensors in GPT-2's names and layout, its zeros written out."""
    config = model.config
    tensors = {name: x.T if name.endswith(TURNED) else x for name, x in plain_tensors(model).items()}
    width, like = config.n_embd, tensors["transformer.wte.weight"]
    if config.pos != "learned":
        table = sinusoidal_positions(config.context, width) if config.pos == "sinusoidal" else None
        tensors["transformer.wpe.weight"] = like.new_zeros(config.context, width) if table is None else table.to(like)
    if not config.bias:
        layers = [name for name in tensors if name.endswith(".weight") and (".h." in name or ".ln_f." in name)]
        # A Conv1D's and a norm's last dimension is its output.
        tensors |= {f"{name.removesuffix('weight')}bias": like.new_zeros(tensors[name].shape[-1]) for name in layers}
    return tensors


def config_json(model: GPT, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """GPT-2's config.json of a model."""
    config = model.config
    end = tokenizer.end_of_text if isinstance(tokenizer, BpeTokenizer) else None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return FUNCTION | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.outputs,
        "n_positions": config.context,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": names[config.act],
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> None:
    """Write a model for transformers' GPT2LMHeadModel.from_pretrained, and its BPE for AutoTokenizer's."""
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        raise ValueError(f"{folder} holds a model already: give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config_json(model, tokenizer), indent=2) + "\n")
    if isinstance(tokenizer, BpeTokenizer):
        write_text(folder / "tokenizer.json", tokenizer.state)
        marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context, **marks}
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_safetensors(folder / WEIGHTS, as_gpt2(model))  # last: a folder without weights is no model
