"""`gptkernels convert SOURCE TARGET`: weights from a run, a file or transformers' GPT-2 into a file or into that form."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import holds_run, load_model
from model.fast import FastGPT
from model.hf import PREFIX, folder_of, write_folder
from model.reference import GPT
from model.safetensors_file import write_safetensors
from model.tokenizer import BpeTokenizer, Tokenizer, read_bpe
from model.weights_file import EVERY, load_weights


def convert(source: str, target: str, overrides: list[str]) -> str:
    """Write the source's model to the target; returns what was written, in words."""
    model, tokenizer = read_source(source, overrides)
    config = model.config
    shape = f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.outputs} tokens"
    if target.startswith(PREFIX):
        folder = folder_of(target)
        write_folder(folder, model, tokenizer)
        bpe = (
            "its tokenizer" if isinstance(tokenizer, BpeTokenizer) else "no tokenizer: transformers knows no characters"
        )
        return f"{folder}: GPT-2 for transformers ({shape}), {bpe}"
    path = Path(target).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"TARGET must be hf:FOLDER or a .safetensors file, got {target!r}")
    if path.exists():
        raise ValueError(f"{path} is there already: give another name, or remove it")
    state = model.state_dict()
    if config.tie:
        del state["lm_head.weight"]  # the same tensor as the table
    write_safetensors(path, state)
    return f"{path}: a state_dict in nn.Linear's layout ({shape}); check it with  gptkernels check {path} n_head={config.n_head}"


def read_source(source: str, overrides: list[str]) -> tuple[GPT, Tokenizer | None]:
    """The reference model of a source, and its tokenizer where it has one."""
    path = folder_of(source)
    if path.suffix == ".pt" or holds_run(path):
        if overrides:
            raise ValueError(f"a run has its own settings, got {overrides[0]!r} for {source}: leave it out")
        model, tokenizer, _ = load_model(source)
        return model.to_reference() if isinstance(model, FastGPT) else model, tokenizer
    if not path.exists():
        raise ValueError(f"SOURCE must be a run, a file of weights or hf:FOLDER, got {source!r}: there is none")
    found, _ = load_weights(path, overrides, EVERY)
    own = path.is_dir() and (path / "tokenizer.json").is_file()
    return found, read_bpe(path) if own else None
