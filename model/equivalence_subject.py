"""What `check` looks at: a configuration, weights and tokens, from a preset, a run folder or a state_dict file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.checkpoint import BEST, LAST, holds_run, load_source
from model.config import Config, parse_override, resolve
from model.data import Tokens, load_dataset, random_batch
from model.equivalence_sites import Choice, as_it_is
from model.fast import FastGPT
from model.hf import PREFIX, folder_of
from model.reference import GPT
from model.weights_file import TOKENS

# A preset does not know the vocabulary of its text; tiny Shakespeare's is this.
CHARACTERS = 65
# As wide as the initial weights: at the initial values themselves, zero and one, a bias or gain that is left out
# would change nothing.
JITTER = 0.02

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is checked: a configuration, a model with its weights, the tokens, and words for all of that."""

    name: str
    config: Config
    weights: GPT
    tokens: Tokens
    description: str

    def batches(self, count: int, seed: int) -> list[Batch]:
        """That many batches of the configuration's size."""
        size = (self.config.train.batch, self.config.model.context)
        return [random_batch(self.tokens, *size, seed, i) for i in range(count)]


@dataclass(frozen=True)
class Models:
    """The three versions of one model: equal weights, no shared tensors, so that each can be trained by itself.

    choose may put other functions at the fast model's operator calls.
    """

    ours: FastGPT
    plain: GPT
    oracle: GPT
    choose: Choice = as_it_is

    @classmethod
    def of(cls, weights: GPT, backend: str, choose: Choice = as_it_is) -> Models:
        """Around copies of a reference's weights, all in train mode."""
        plain, shared = copy.deepcopy(weights).train(), copy.deepcopy(weights).train()
        ours = FastGPT.from_reference(shared, backend=backend).train()
        return cls(ours, plain, copy.deepcopy(weights).double().train(), choose)


def subject(name: str, overrides: Sequence[str], seed: int) -> Subject:
    """A run's trained model on its text; a state_dict's, or a preset's fresh one, on random tokens."""
    path = folder_of(name)
    if name.startswith(PREFIX) or holds_run(path) or (path.is_file() and path.suffix != ".toml"):
        place, given = "", overrides
        if holds_run(path):  # its text may have moved, all else is its own
            places = [value for key, value in map(parse_override, overrides) if key == "train.data"]
            place, given = (places or [""])[-1], [word for word in overrides if parse_override(word)[0] != "train.data"]
        weights, tokenizer, config = load_source(name, given, TOKENS)
        if tokenizer is not None:
            place = place or config.train.data
            dataset = load_dataset(place, config.train.val_fraction, config.model.context, tokenizer)
            return Subject(name, config, weights, dataset.train, f"trained weights, text: {dataset.source}")
        m = config.model
        what = (
            f"weights of the file ({m.n_layer} layers, {m.n_head} heads, width {m.n_embd}), random tokens, seed {seed}"
        )
        return Subject(name, config, weights, random_tokens(config, seed), f"{what}, {m.context} at once")
    if "/" in name and path.suffix != ".toml":
        what = f"it has neither {LAST} nor {BEST}" if path.is_dir() else "there is no such file or folder"
        raise ValueError(f"{name} is no run and no state_dict file: {what}. Give one of them, or a preset's name")
    config, _ = resolve(name, list(overrides))
    if not config.model.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=CHARACTERS))
    torch.manual_seed(seed)
    weights = GPT(config.model)
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(JITTER * torch.randn_like(p))
    return Subject(name, config, weights, random_tokens(config, seed), f"fresh weights, random tokens, seed {seed}")


def random_tokens(config: Config, seed: int) -> Tensor:
    """A text of no sense, long enough for different batches."""
    count = 4 * config.train.batch * (config.model.context + 1)
    return torch.randint(config.model.outputs, (count,), generator=torch.Generator().manual_seed(seed))
