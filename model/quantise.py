"""A trained GPT as tools for serving want it: torchao's quantize_, pruning and exporters look for nn.Linear."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from model.fast import FastGPT, Model
from model.generate import as_written
from model.reference import GPT, Linear


def with_nn_linear(model: Model) -> GPT:
    """A copy of the model in eval mode, in plain PyTorch, each linear layer an nn.Linear with the same weights and name.

    Its state_dict is the model's; a head that is tied to the embeddings is so until a tool gives it weights of its own.
    Raises ValueError for LoRA that is not merged, and for a FastGPT with methods or hooks of its own.
    """
    if any(parametrize.is_parametrized(layer) for layer in model.modules()):
        raise ValueError(
            "a model with LoRA must be merged first, got one that is not: model.lora.merge_lora does, and load_model"
        )
    if isinstance(model, FastGPT) and not as_written(model):
        raise ValueError(
            f"only what FastGPT computes is there in plain PyTorch, got {type(model).__name__} with methods or hooks of its "
            "own: write these in plain PyTorch, on layers that are nn.Linear"
        )
    copied = copy.deepcopy(model.to_reference() if isinstance(model, FastGPT) else model)
    copied.zero_grad()
    for module in list(copied.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Linear):
                setattr(module, name, nn_linear(layer))
    return copied.eval()


def nn_linear(layer: Linear) -> nn.Linear:
    """nn.Linear on the layer's own parameters."""
    with torch.device("meta"):  # its own would be thrown away
        made = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None)
    made.weight = layer.weight
    made.register_parameter("bias", layer.bias)
    return made
