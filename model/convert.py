"""`gptkernels convert SOURCE TARGET`: weights from a run, a file or transformers' GPT-2 into a file or into that form."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import load_source
from model.files import user_path
from model.hf import PREFIX, folder_of, own_tokenizer, plain_tensors, write_folder
from model.reference import GPT
from model.safetensors_file import write_safetensors
from model.tokenizer import BpeTokenizer, Tokenizer
from model.weights_file import EVERY, told


def convert(source: str, target: str, overrides: list[str]) -> str:
    """Write the source's model to the target; returns what was written, in words."""
    if not folder_of(source).exists():
        raise ValueError(f"SOURCE must be a run, a file of weights or hf:FOLDER, got {source!r}: there is none")
    model, tokenizer, _ = load_source(source, overrides, EVERY)
    config = model.config
    shape = f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.outputs} tokens"
    if target.startswith(PREFIX):
        folder = folder_of(target)
        tokenizer = tokenizer or own_tokenizer(folder_of(source))
        write_folder(folder, model, tokenizer)
        return f"{folder}: GPT-2 for transformers ({shape}), {described(tokenizer)}"
    path = user_path(target)
    if path.suffix != ".safetensors":
        raise ValueError(f"TARGET must be hf:FOLDER or a .safetensors file, got {target!r}")
    if path.exists():
        raise ValueError(f"{path} is there already: give another name, or remove it")
    write_weights(path, model)
    return f"{path}: a state_dict in nn.Linear's layout ({shape}); check it with  gptkernels check {path}"


def write_weights(path: Path, model: GPT) -> None:
    """A .safetensors file of a model, which says what the shapes do not."""
    write_safetensors(path, plain_tensors(model), told(model.config))


def described(tokenizer: Tokenizer | None) -> str:
    """What becomes of a source's tokenizer in transformers' form."""
    if tokenizer is None:
        return "no tokenizer: the source has none"
    return "its tokenizer" if isinstance(tokenizer, BpeTokenizer) else "not its characters: transformers knows none"
