"""The one schema of all settings: frozen dataclasses, filled from defaults, a preset and `key=value`, in that order."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.backends import by_operator
from model.files import user_path

PRESETS = Path(__file__).parent / "presets"

TRUE_WORDS = ("true", "on", "yes", "1")
FALSE_WORDS = ("false", "off", "no", "0")


def key(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A setting with its default, its one line of help and, where it is a word, the words allowed."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT: everything that decides which parameters exist and what the forward computes."""

    vocab_size: int = key(0, "rows V of the token table; 0 takes the data's tokens, of BPE up to a multiple of 64")
    words: int = key(0, "rows that are tokens, the others are never a target or sampled; 0 takes the data's tokens")
    context: int = key(64, "tokens the model sees at once, T")
    n_layer: int = key(4, "transformer blocks L")
    n_head: int = key(4, "attention heads H")
    n_embd: int = key(128, "width C, a multiple of n_head")
    bias: bool = key(True, "biases in the linear layers and LayerNorms")
    dropout: float = key(0.0, "probability of dropping an attention weight or a residual value while training")
    pos: str = key("learned", "how positions enter", ("learned", "sinusoidal", "none"))
    act: str = key("gelu_tanh", "the MLP's activation: GELU by GPT-2's tanh formula or by erf", ("gelu_tanh", "gelu"))
    tie: bool = key(True, "the head is the token embedding's own tensor")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("context", "n_layer", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.vocab_size >= 0, f"vocab_size must be 0 (from the data) or positive, got {self.vocab_size}")
        require(
            0 <= self.words <= (self.vocab_size or self.words),
            f"words must be from 0 (from the data) to vocab_size, got {self.words} and {self.vocab_size}",
        )
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}: change one of them",
        )
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        require(
            self.pos != "sinusoidal" or self.n_embd % 2 == 0,
            f"pos=sinusoidal pairs sines with cosines and needs an even n_embd, got {self.n_embd}",
        )

    @property
    def outputs(self) -> int:
        """How many logits there are: the rows of the head that are tokens."""
        return self.words or self.vocab_size


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained: data, optimizer, schedule, evaluation, and what runs it."""

    data: str = key(
        "shakespeare", "shakespeare, shakespeare:PATH_OR_URL, english, python, a UTF-8 file or folder, or token shards"
    )
    init: str = key("", "begin with the weights and shape of hf:FOLDER, a GPT-2 as transformers saves it, or of a file")
    val_fraction: float = key(0.1, "share of the text, at its end, kept for validation; token shards have their own")
    steps: int = key(2000, "optimizer steps")
    batch: int = key(12, "sequences a step, B, on all devices together")
    batch_tokens: int = key(0, "tokens a step instead of batch, a multiple of context; 0 means batch * context")
    micro_batch: str = key("auto", "sequences of one forward and backward on a device; auto is the most that fit")
    lr: float = key(1e-3, "peak learning rate, reached after the warmup")
    min_lr: float = key(1e-4, "learning rate at the end")
    warmup: int = key(100, "steps of linear warmup")
    schedule: str = key(
        "cosine", "from lr to min_lr: along a cosine, or stable and down in the last steps", ("cosine", "wsd")
    )
    decay: float = key(0.2, "share of the steps in which schedule=wsd goes down")
    beta1: float = key(0.9, "AdamW's decay of the mean gradient")
    beta2: float = key(0.95, "AdamW's decay of the mean squared gradient")
    weight_decay: float = key(0.1, "AdamW's decay of tensors with two or more dimensions")
    clip: float = key(1.0, "largest norm of the whole gradient; 0 turns clipping off")
    ema: float = key(
        0.0, "decay of a moving average of the weights (less at first), which is what is evaluated then; 0 keeps none"
    )
    eval_every: int = key(250, "steps between evaluations and checkpoints")
    eval_batches: int = key(20, "random batches of nanoGPT's way to evaluate; the full pass is always done as well")
    log_every: int = key(10, "steps between lines of metrics.csv and metrics.jsonl")
    tensorboard: bool = key(False, "write TensorBoard's events into the run folder as well")
    seed: int = key(1337, "start of every random number")
    dtype: str = key(
        "auto",
        "arithmetic of the forward and backward, parameters stay fp32; auto: bf16, fp16 on GPUs without it, fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    tf32: bool = key(False, "fp32 products on a GPU's tensor cores, with factors rounded to 11 bits")
    recompute: str = key(
        "none",
        "what a block's backward computes again instead of keeping it: nothing, cheap operators, all",
        ("none", "selective", "full"),
    )
    compile: bool = key(False, "torch.compile for the training step: minutes before the first one, then fewer kernels")
    model: str = key("fast", "fast runs on gptkernels, reference is plain PyTorch", ("fast", "reference"))
    backend: str = key(
        "auto",
        "backend of the fast operators: auto is the fastest that works, doctor lists them; auto,layer_norm:NAME for one",
    )
    device: str = key("auto", "auto, cpu or cuda; each rank of torchrun takes the GPU of its number")
    parallel: str = key(
        "ddp", "how several ranks share the model: each holds all of it, or a part of every tensor", ("ddp", "fsdp")
    )
    offload: bool = key(
        False, "parallel=fsdp keeps weights and AdamW's state in the host's memory and updates them there"
    )
    threads: int = key(0, "CPU threads; 0 leaves torch's choice")
    out: str = key("runs", "folder that holds the run folders")
    name: str = key("", "name of the run folder; empty makes one from the preset and the time")
    sample_tokens: int = key(200, "tokens of the sample written at each evaluation; 0 writes none")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch", "eval_every", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "eval_batches", "threads", "sample_tokens", "weight_decay", "clip", "min_lr", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        require(self.seed < 2**64, f"seed must be below 2 to the power of 64, as torch has it, got {self.seed}")
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require(self.min_lr <= self.lr, f"min_lr must not exceed lr, got {self.min_lr} and {self.lr}: give both")
        require(0.0 < self.decay <= 1.0, f"decay must be above 0 and at most 1, got {self.decay}")
        require(0.0 < self.val_fraction < 1.0, f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("beta1", "beta2", "ema"):
            require(0.0 <= getattr(self, name) < 1.0, f"{name} must be in [0, 1), got {getattr(self, name)}")
        by_operator(self.backend)
        require(
            self.batch_tokens >= 0, f"batch_tokens must be 0 (batch * context) or positive, got {self.batch_tokens}"
        )
        require(
            self.micro_batch == "auto" or (self.micro_batch.isdecimal() and int(self.micro_batch) > 0),
            f"micro_batch must be auto or a number of sequences, got {self.micro_batch!r}",
        )
        require(bool(self.data), "data must name a text: shakespeare, python, or a file or folder")
        require(
            self.name not in (".", "..") and not set(self.name) & set("/\\"),
            f"name must be a plain folder name, got {self.name!r}: use out= for the place",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Training of low-rank differences alone (model/lora.py)."""

    rank: int = key(
        0, "train a difference of this rank in attention's and MLP's projections, nothing else; 0: everything"
    )
    alpha: float = key(16.0, "the difference is multiplied by alpha / rank")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rank >= 0, f"rank must be 0 (no LoRA) or positive, got {self.rank}")
        require(self.alpha > 0, f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True)
class Config:
    """A model and how to train it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    # What the command line said, by dotted name: no setting, but a checkpoint to begin with must not contradict it.
    said: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        t = self.train
        require(self.lora.rank == 0 or bool(t.init), f"lora.rank={self.lora.rank} needs weights to keep: give init=")
        require(
            t.parallel == "ddp" or not (t.compile or t.dtype == "fp16"),
            "parallel=fsdp is for compile=off and dtype=bf16 or fp32: change one of them, or take parallel=ddp",
        )
        require(
            t.parallel == "fsdp" or not t.offload,
            "offload=on is for parallel=fsdp, on several ranks: take that, or recompute=full for less memory",
        )
        tokens, context, micro = self.train.batch_tokens, self.model.context, self.train.micro_batch
        require(
            tokens % context == 0,
            f"batch_tokens must be a multiple of context, got {tokens} and {context}: "
            f"{max(round(tokens / context), 1) * context} is the nearest",
        )
        require(
            micro == "auto" or self.sequences % int(micro) == 0,
            f"micro_batch must divide the step's {self.sequences} sequences, got {micro}: {divisors(self.sequences)} do",
        )

    @property
    def sequences(self) -> int:
        """Sequences of one optimizer step on all devices together."""
        return self.train.batch_tokens // self.model.context or self.train.batch


SECTIONS: dict[str, type] = {"model": ModelConfig, "train": TrainConfig, "lora": LoraConfig}


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not holds:
        raise ValueError(message)


def divisors(n: int) -> str:
    """Every number that divides n, in words."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return " and ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def check_types(section: Any) -> None:
    """Raise unless each value has its field's type, is finite, and is one of its words where they are listed."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if type(value).__name__ != f.type:
            raise TypeError(f"{f.name} must be of type {f.type}, got {value!r}")
        require(not isinstance(value, float) or math.isfinite(value), f"{f.name} must be finite, got {value}")
        choices = f.metadata["choices"]
        require(not choices or value in choices, f"{f.name} must be one of {', '.join(choices)}, got {value!r}")


def all_keys() -> dict[str, dataclasses.Field[Any]]:
    """Every setting by its dotted name, in the order of the schema."""
    return {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


def full_key(name: str) -> str:
    """The dotted key that a dotted or bare name means; ValueError with the nearest key when there is none."""
    keys = all_keys()
    if name in keys:
        return name
    matches = [k for k in keys if k.split(".")[1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"key {name!r} is in several sections: write {' or '.join(matches)}")
    raise ValueError(f"unknown key {name!r}: the nearest is {nearest_key(name)!r} (--print-config lists them all)")


def nearest_key(name: str) -> str:
    """The key that an unknown one most likely means: of another section, by its spelling, or its help's words."""
    keys = all_keys()
    candidates = [k.split(".")[1] for k in keys] + list(keys)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
    bare = name.rpartition(".")[2]
    elsewhere, words = [k for k in keys if k.split(".")[1] == bare], bare.replace("_", " ")
    described = [k.split(".")[1] for k, f in keys.items() if words in f.metadata["help"]]
    return (elsewhere + close + described + difflib.get_close_matches(name, candidates, n=1, cutoff=0.0))[0]


def parse_value(name: str, text: str) -> Any:
    """A setting's value from its written form, by the field's type."""
    kind = all_keys()[name].type
    if kind == "str":
        return text
    if kind == "bool":
        if text.lower() in TRUE_WORDS + FALSE_WORDS:
            return text.lower() in TRUE_WORDS
        raise ValueError(f"{name} must be on or off, got {text!r}")
    try:
        return int(text.replace("_", "")) if kind == "int" else float(text)
    except ValueError:
        wanted = "a whole number" if kind == "int" else "a number"
        raise ValueError(f"{name} must be {wanted}, got {text!r}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """(dotted key, value) of a `key=value` argument."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an override must be written key=value, got {text!r}")
    name = full_key(name.strip())
    return name, parse_value(name, value.strip())


def override(settings: dict[str, Any], name: str, value: Any) -> None:
    """Change one of dotted settings; the size of a step has two names, of which the later one said counts."""
    settings[name] = value
    if name == "train.batch":
        settings["train.batch_tokens"] = 0


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def preset_names() -> list[str]:
    """The presets that come with the program."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(preset: str) -> dict[str, Any]:
    """Dotted settings of a preset, by its name or by the path of a .toml file."""
    path = user_path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.is_file():
        raise ValueError(f"no preset {preset!r}: choose {', '.join(preset_names())}, or the path of a .toml file")
    settings = {}
    for section, table in read_toml(path).items():
        require(isinstance(table, dict), f"{path}: {section} must stand in a [model], [train] or [lora] table")
        for name, value in table.items():
            full = full_key(f"{section}.{name}")
            # TOML's 1 is an int; a float setting takes it, and one of a word or a number as well.
            convert = {"float": float, "str": str}.get(str(all_keys()[full].type)) if type(value) is int else None
            settings[full] = convert(value) if convert else value
    return settings


def build(settings: dict[str, Any]) -> Config:
    """The configuration of dotted settings over the defaults."""
    sections: dict[str, dict[str, Any]] = {s: {} for s in SECTIONS}
    for name, value in settings.items():
        section, short = full_key(name).split(".")
        sections[section][short] = value
    return Config(**{name: cls(**sections[name]) for name, cls in SECTIONS.items()})


def resolve(preset: str = "", overrides: list[str] | tuple[str, ...] = ()) -> tuple[Config, dict[str, str]]:
    """The configuration of a preset (or none) and overrides, and for each key where its value came from."""
    settings = read_preset(preset) if preset else {}
    origins = {name: f"preset {preset}" if name in settings else "default" for name in all_keys()}
    for name, value in map(parse_override, overrides):
        override(settings, name, value)
        origins[name] = "command line"
    said = frozenset(name for name, origin in origins.items() if origin == "command line")
    return dataclasses.replace(build(settings), said=said), origins


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {f"{s}.{k}": v for s in SECTIONS for k, v in dataclasses.asdict(getattr(config, s)).items()}


def format_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are all TOML's too
    return repr(value)


def to_toml(config: Config) -> str:
    """The whole configuration as a TOML text that read_preset takes back."""
    tables = []
    for section in SECTIONS:
        table = dataclasses.asdict(getattr(config, section))
        lines = [f"[{section}]"] + [f"{k} = {format_value(v)}" for k, v in table.items()]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def describe(config: Config, origins: dict[str, str]) -> str:
    """One line a key: its value, where it came from, and what it means."""
    keys = all_keys()
    rows = [(name, format_value(value), origins.get(name, "default")) for name, value in flatten(config).items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for name, value, origin in rows:
        text = keys[name].metadata["help"]
        choices = keys[name].metadata["choices"]
        text += f" ({', '.join(choices)})" if choices else ""
        lines.append(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin:<{widths[2]}}  {text}")
    return "\n".join(lines)
