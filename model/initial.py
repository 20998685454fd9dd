"""What a training begins with where init= names another model: its weights, its shape, and a check of its tokens."""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor

from model.checkpoint import holds_run, load
from model.config import Config, ModelConfig
from model.hf import PREFIX, fitted, folder_of, own_tokenizer
from model.tokenizer import Tokenizer, restored
from model.weights_file import EVERY, load_weights


def initial(config: Config, tokenizer: Tokenizer) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(shape, weights) of the checkpoint that init= names, hf:FOLDER or a file, for data of this tokenizer.

    Of the given shape remain the context, for which the checkpoint must have the positions, the dropout, and what a file does
    not tell, the number of heads, the activation and positions without a table; ValueError where the command line said another
    one than the checkpoint's.
    """
    place, own = config.train.init, config.model
    defaults = {"model.n_head": own.n_head, "model.act": own.act}
    if "model.pos" in config.said:
        defaults["model.pos"] = own.pos
    model, found = load_weights(folder_of(place), [f"context={own.context}"], EVERY, defaults)
    shape = fitted(replace(found.model, dropout=own.dropout), tokenizer, place)
    check_pieces(place, tokenizer)
    for field in fields(ModelConfig):
        said, right = getattr(own, field.name), getattr(shape, field.name)
        if f"model.{field.name}" in config.said and said != right:
            raise ValueError(f"{field.name} must be {right!r}, as in init={place}, got {said!r}: leave it out")
    return shape, model.state_dict()


def check_pieces(place: str, tokenizer: Tokenizer) -> None:
    """Raise where the data's tokens are others than those that a checkpoint was trained on, as far as it tells them."""
    path = folder_of(place)
    if place.startswith(PREFIX):
        own: Tokenizer | None = own_tokenizer(path)
    else:
        own = restored(load(path, tensors=())["tokenizer"]) if holds_run(path) else None
    if own is not None and own.pieces != tokenizer.pieces:
        raise ValueError(
            f"data must have the tokens of {place}, got other {tokenizer.description}: make token shards of it with "
            "gptkernels data SOURCE --tokenizer, naming that model's tokenizer, or take a text of the same characters"
        )
