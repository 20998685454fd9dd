"""`bench train`: a whole training step of the reference, best eager, torch.compile of it, ours, and torch.compile of ours.

All columns train the very same Parameter objects with the very same optimizer. The learning rate is 0: AdamW does all of
its work and the weights stay what they were when the columns were compared with float64, so that what is timed is
exactly what has passed the gate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.best_eager import BestEager
from benchmarks.breakdown import breakdown
from benchmarks.case import GPU_BACKENDS, OURS_COMPILED, column_dtype, column_names, factor, run_case
from benchmarks.compiler import compiled
from benchmarks.device import AS_IT_COMES, Stages, clock_of, timed
from benchmarks.harness import Column
from benchmarks.kept import Kept
from benchmarks.memory import give_back_heap
from benchmarks.options import Options
from gptkernels.cost import Cost, training_step
from model.config import Config, ModelConfig, TrainConfig, resolve
from model.equivalence_rule import Row, compare
from model.equivalence_subject import CHARACTERS, JITTER
from model.fast import FastGPT
from model.files import user_path
from model.optimize import make_optimizer
from model.reference import GPT

ROWS = ("forward", "backward", "step")
# Beside the presets: nanoGPT's character model without dropout, with few and with all of its 64 sequences, and GPT-2's width
# and vocabulary with few layers.
GPT_384 = ModelConfig(vocab_size=65, context=256, n_layer=6, n_head=6, n_embd=384, bias=False)
SIZES = {
    "gpt-384": Config(GPT_384, TrainConfig(batch=8)),
    "gpt2-width": Config(
        ModelConfig(vocab_size=50257, context=256, n_layer=4, n_head=12, n_embd=768), TrainConfig(batch=2)
    ),
    "gpt-384-b64": Config(GPT_384, TrainConfig(batch=64)),
}
# The sequences that are measured where batch_tokens is of many and the memory decides how many at once.
MICRO_BATCH = 16
DEFAULT_CASES = {"cpu": ("shakespeare-cpu", "gpt-384", "gpt2-width"), "cuda": ("gpt-384-b64", "gpt2-124m")}
# What a process warms up with before it measures memory.
TINY = "tiny"

# A loss is one number: over so many batches the largest error is no matter of the luck of one rounding.
BATCHES = 8
# On a GPU float64 is computed from so many tokens at a time, and logits are compared of so many: GPT-2's logits of a whole
# batch are 6.6 GB in float64, and its attention scores more.
FEW_TOKENS = 2048

Batch = tuple[Tensor, Tensor]
Outcome = dict[str, Tensor]


def train_config(name: str) -> Config:
    """The configuration of a built-in size, or of a preset with tiny Shakespeare's vocabulary where it names none."""
    if name in SIZES:
        return SIZES[name]
    config, _ = resolve(name, [])
    if config.train.batch_tokens:
        micro = config.train.micro_batch
        few = min(config.sequences, MICRO_BATCH) if micro == "auto" else int(micro)
        config = replace(config, train=replace(config.train, batch=few, batch_tokens=0))
    if config.model.dropout:
        raise ValueError(
            f"bench train needs dropout=0, since F.scaled_dot_product_attention draws other masks than the reference; "
            f"{name} has dropout={config.model.dropout}: measure a preset without"
        )
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or CHARACTERS))


class TrainColumn:
    """One way to do a training step on fixed weights."""

    total = "step"

    def __init__(
        self,
        name: str,
        loss: Callable[[Tensor, Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        bench: TrainBench,
        model: nn.Module,
    ) -> None:
        self.name, self.model = name, model
        self.loss_of, self.logits_of = loss, logits
        self.bench = bench
        self.dtype = column_dtype(name, bench.dtype)
        self.value: Tensor | None = None

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with autocast(self.bench.device, self.dtype):
            return self.loss_of(*batch)

    def forward(self) -> None:
        """The loss of the first batch."""
        self.value = self.loss(self.bench.batches[0])

    def backward(self) -> None:
        """The gradients. What is left of the graph is given back inside the timing: a real cost of a step."""
        assert self.value is not None
        self.value.backward()
        self.value = None

    def optimize(self) -> None:
        """AdamW's step; the gradients are given back inside the timing too."""
        self.bench.optimizer.step()
        self.bench.optimizer.zero_grad(set_to_none=True)

    def stages(self) -> Stages:
        """The timed parts in order."""
        return ("forward", self.forward), ("backward", self.backward), ("optimizer", self.optimize)

    def run(self) -> dict[str, float]:
        """Seconds of forward, backward, optimizer and the whole step."""
        return timed(self.bench.clock, self.stages(), self.total)

    def results(self) -> Outcome:
        """The losses of all batches, and the logits and every gradient of the first one."""
        bench = self.bench
        bench.weights.zero_grad(set_to_none=True)
        first = self.loss(bench.batches[0])
        first.backward()
        found = gradients(bench.weights)
        bench.weights.zero_grad(set_to_none=True)
        losses = [first.detach(), *(self.loss(batch).detach() for batch in bench.batches[1:])]
        with torch.no_grad(), autocast(bench.device, self.dtype):
            logits = self.logits_of(bench.batches[0][0][: bench.few])
        return {"losses": torch.stack(losses), "logits": logits, **found}

    def kept_bytes(self) -> int:
        """Bytes that the forward keeps for the backward, beside weights and batch."""
        self.forward()
        assert self.value is not None
        found = Kept([*self.bench.weights.parameters(), *self.bench.batches[0]]).add([self.value])
        self.clear()
        return found

    def holds(self) -> Outcome:
        """The gradients, once they are there: they pin down all that a graph has computed before."""
        return gradients(self.bench.weights) if self.bench.weights.lm_head.weight.grad is not None else {}

    def gathered(self, held: Sequence[Outcome]) -> Outcome:
        """The gradients that the stage of the backward has held."""
        return held[1]

    def clear(self) -> None:
        """Give back what a run has made."""
        self.value = None
        self.bench.weights.zero_grad(set_to_none=True)


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """A 16-bit dtype is autocast over fp32 weights."""
    wanted = dtype.itemsize == 2
    return torch.autocast(device, dtype=dtype if wanted else torch.bfloat16, enabled=wanted)


def gradients(weights: nn.Module) -> Outcome:
    """Every gradient by its parameter's name."""
    # A parameter that no gradient reached is a finding, not an exception: NaN fails the rule by itself.
    return {
        f"grad {name}": torch.full_like(p, math.nan) if p.grad is None else p.grad.detach()
        for name, p in weights.named_parameters()
    }


class TrainBench:
    """Weights, batches and optimizer of a case: what all of its columns share."""

    def __init__(
        self, config: Config, dtype: str, backend: str, device: str = "cpu", cache: str = AS_IT_COMES, seed: int = 0
    ) -> None:
        self.config, self.dtype, self.backend, self.device = config, dtype, backend, device
        self.clock = clock_of(device, cache)
        torch.manual_seed(seed)
        with torch.device(device):
            self.weights = GPT(config.model)
        with torch.no_grad():
            for p in self.weights.parameters():
                p.add_(JITTER * torch.randn_like(p))
        B, T = config.train.batch, config.model.context
        self.few = B if device == "cpu" else min(B, max(1, FEW_TOKENS // T))
        tokens = torch.randint(config.model.outputs, (BATCHES, 2, B, T)).to(device)
        self.batches: list[Batch] = [(x, y) for x, y in tokens]
        self.optimizer = make_optimizer(self.weights, config)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            group["capturable"] = device == "cuda"  # without it a step must not be in a CUDA graph

    def column(self, name: str) -> TrainColumn:
        """One column by its name."""
        if name == "reference":
            model = self.weights
            return TrainColumn(name, lambda *batch: model(*batch)[1], lambda idx: model(idx)[0], self, model)
        if name in ("eager", "compile"):
            eager = BestEager(self.weights)
            loss = compiled(eager.loss) if name == "compile" else eager.loss
            # The compiled column's logits are best eager's: its own function is the loss, which its gradients pin down.
            return TrainColumn(name, loss, eager, self, eager)
        ours = FastGPT.from_reference(self.weights, backend=name if name in GPU_BACKENDS else self.backend)

        def loss(idx: Tensor, targets: Tensor) -> Tensor:
            return ours(idx, targets)[1]

        if name == OURS_COMPILED:
            loss = compiled(loss, beside=True)
        return TrainColumn(name, loss, lambda idx: ours(idx)[0], self, ours)

    def oracle(self) -> Outcome:
        """The reference in float64."""
        return self.in_parts(copy.deepcopy(self.weights).double(), torch.float64)

    def plain(self, dtype: torch.dtype) -> Outcome:
        """The reference in a dtype."""
        self.weights.zero_grad(set_to_none=True)
        outcome = self.in_parts(self.weights, dtype)
        self.weights.zero_grad(set_to_none=True)
        return outcome

    def in_parts(self, model: GPT, dtype: torch.dtype) -> Outcome:
        """What the model gives, few sequences at a time: a mean over a batch is the mean of those of equal parts."""
        B = self.config.train.batch

        def parts(batch: Batch) -> Iterator[Tensor]:
            """Losses that add up to the batch's."""
            for idx, targets in zip(*(x.split(self.few) for x in batch), strict=True):
                with autocast(self.device, dtype):
                    loss = model(idx, targets)[1]
                yield loss * (len(idx) / B)

        losses = []
        for part in parts(self.batches[0]):
            part.backward()
            losses.append(part.detach())
        with torch.no_grad(), autocast(self.device, dtype):
            rest = [sum(parts(batch)) for batch in self.batches[1:]]
            logits = model(self.batches[0][0][: self.few])[0]
        return {"losses": torch.stack([sum(losses), *rest]), "logits": logits, **gradients(model)}

    def parameter_bytes(self) -> int:
        """Bytes of all weights, which are those of all gradients."""
        return sum(p.numel() * p.element_size() for p in self.weights.parameters())

    def cost(self, row: str, dtype: torch.dtype) -> Cost:
        """Flops and bytes of a row; the optimizer's are left out, so that step has those of forward and backward."""
        m = self.config.model
        B = self.config.train.batch
        step = training_step(m.n_layer, m.n_head, m.n_embd, m.vocab_size, B, m.context, dtype.itemsize)
        return step.both if row == "step" else getattr(step, row)


class Gate:
    """The errors of a column's losses, logits and gradients against float64, beside those of the reference."""

    def __init__(self, bench: TrainBench) -> None:
        self.bench = bench
        self.oracle = bench.oracle()
        self.plain: dict[torch.dtype, Outcome] = {}

    def __call__(self, column: Column, got: object) -> list[Row]:
        """One row a quantity that there is: a CUDA graph has gradients alone."""
        assert isinstance(column, TrainColumn)
        assert isinstance(got, dict)
        if column.dtype not in self.plain:
            # The reference is the first column; in parts for our fp32 column in a bf16 run, and where there was no memory
            # for the whole batch at once.
            self.plain[column.dtype] = got if column.name == "reference" else self.bench.plain(column.dtype)
        plain = self.plain[column.dtype]
        return [
            compare(
                name,
                values,
                plain[name],
                self.oracle[name],
                dtype=column.dtype,
                factor=factor(column.name, name.startswith("grad ")),
            )
            for name, values in got.items()
        ]


def columns_of(options: Options) -> list[str]:
    """The columns of a training step, in order; on a GPU a CUDA graph does what compiling ours would."""
    return column_names(options) + ([OURS_COMPILED] if options.compile and options.device == "cpu" else [])


def bench_case(name: str, options: Options) -> dict[str, object]:
    """Every figure of the training step of one size."""
    config = train_config(name)
    m, B = config.model, config.train.batch
    bench = TrainBench(config, options.dtype, options.backend, options.device, options.cache)
    parameters = sum(p.numel() for p in bench.weights.parameters())
    shape = {"L": m.n_layer, "H": m.n_head, "C": m.n_embd, "T": m.context, "B": B, "V": m.vocab_size}
    case = run_case(
        f"{name} training step " + " ".join(f"{k}={v}" for k, v in shape.items()),
        columns_of(options),
        ROWS,
        build=bench.column,
        judge=Gate(bench),
        cost=bench.cost,
        gradient_bytes=bench.parameter_bytes(),
        work=work_of(name),
        options=options,
    )
    extra: dict[str, object] = {"logits_compared": bench.few * m.context}
    if options.breakdown:
        plain = [column for column in ("eager", *case["ours"]) if column != OURS_COMPILED]
        timed_columns = [column for column in plain if ROWS[0] in case["columns"][column]]
        extra["breakdown"] = breakdown(bench, timed_columns, options)
    return {"size": name, "shape": shape, "parameters": parameters, **extra, **case}


def bench_train(names: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """The cases of the named sizes, as they are done."""
    for name in names:
        yield bench_case(name, options)


def work_of(name: str) -> dict[str, object]:
    """What a process that measures a column's memory builds: it runs in another folder, so a file's path must be whole."""
    return {"kind": "train", "size": str(user_path(name).resolve()) if name.endswith(".toml") else name}


def peak_work(work: dict) -> tuple[Column, int]:
    """For benchmarks.memory: the column of a step after its warm-up, and the bytes of its gradients."""
    dtype, backend, name = (str(work[key]) for key in ("dtype", "backend", "column"))
    bench = TrainBench(train_config(str(work["size"])), dtype, backend)
    # The first step of AdamW makes its state, which is no part of what is measured.
    for p in bench.weights.parameters():
        p.grad = torch.zeros_like(p)
    bench.optimizer.step()
    bench.optimizer.zero_grad(set_to_none=True)
    column = bench.column(name)
    give_back_heap()
    if name == "compile":
        column.run()
    else:
        TrainBench(train_config(TINY), dtype, backend).column(name).run()
    return column, bench.parameter_bytes()
