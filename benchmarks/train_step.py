"""`bench train`: a whole training step of the reference, best eager, torch.compile of it, and ours.

All columns train the very same Parameter objects with the very same optimizer. The learning rate is 0: AdamW does all of
its work and the weights stay what they were when the columns were compared with float64, so that what is timed is
exactly what has passed the gate.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import column_dtype, column_names, factor, run_case
from benchmarks.compiler import compiled
from benchmarks.harness import Column
from benchmarks.options import Options
from gptkernels.cost import Cost, training_step
from model.config import Config, ModelConfig, TrainConfig, resolve
from model.equivalence_rule import Row, compare
from model.equivalence_subject import CHARACTERS, JITTER
from model.fast import FastGPT
from model.reference import GPT, sinusoidal_positions
from model.train import make_optimizer

ROWS = ("forward", "backward", "step")
# Beside the presets: nanoGPT's character model for a GPU, and GPT-2's width and vocabulary with few layers.
SIZES = {
    "gpt-384": Config(
        ModelConfig(vocab_size=65, context=256, n_layer=6, n_head=6, n_embd=384, bias=False), TrainConfig(batch=8)
    ),
    "gpt2-width": Config(
        ModelConfig(vocab_size=50257, context=256, n_layer=4, n_head=12, n_embd=768), TrainConfig(batch=2)
    ),
}
DEFAULT_CASES = ("shakespeare-cpu", *SIZES)
# What a process warms up with before it measures memory.
TINY = "tiny"

# A loss is one number: over so many batches the largest error is no matter of the luck of one rounding.
BATCHES = 8

Batch = tuple[Tensor, Tensor]


def train_config(name: str) -> Config:
    """The configuration of a built-in size, or of a preset with tiny Shakespeare's vocabulary where it names none."""
    if name in SIZES:
        return SIZES[name]
    config, _ = resolve(name)
    if config.model.dropout:
        raise ValueError(
            f"bench train needs dropout=0, since F.scaled_dot_product_attention draws other masks than the reference; "
            f"{name} has dropout={config.model.dropout}: measure a preset without"
        )
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or CHARACTERS))


class BestEager(nn.Module):
    """The GPT as a careful PyTorch user writes it: torch's fused attention, LayerNorm, GELU and cross-entropy."""

    def __init__(self, weights: GPT) -> None:
        """Around the reference's own Parameter objects."""
        super().__init__()
        self.config = weights.config
        self.transformer, self.lm_head = weights.transformer, weights.lm_head
        if self.config.pos == "sinusoidal":
            table = sinusoidal_positions(self.config.context, self.config.n_embd)
            self.register_buffer("positions", table.to(self.lm_head.weight), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x = F.embedding(idx, self.transformer.wte.weight)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[: idx.shape[1]]
        elif self.config.pos == "sinusoidal":
            x = x + self.positions[: idx.shape[1]]
        for block in self.transformer.h:
            x = x + self.attend(block.attn, norm(block.ln_1, x))
            x = x + self.think(block.mlp, norm(block.ln_2, x))
        return F.linear(norm(self.transformer.ln_f, x), self.lm_head.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    def attend(self, attn: nn.Module, h: Tensor) -> Tensor:
        """The attention branch."""
        B, T, C = h.shape
        H = self.config.n_head
        qkv = F.linear(h, attn.c_attn.weight, attn.c_attn.bias)
        q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in qkv.split(C, dim=2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(B, T, C), attn.c_proj.weight, attn.c_proj.bias)

    def think(self, mlp: nn.Module, h: Tensor) -> Tensor:
        """The MLP branch."""
        approximate = "tanh" if self.config.act == "gelu_tanh" else "none"
        inner = F.gelu(F.linear(h, mlp.c_fc.weight, mlp.c_fc.bias), approximate=approximate)
        return F.linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)


def norm(ln: nn.Module, x: Tensor) -> Tensor:
    """torch's LayerNorm with the reference's epsilon."""
    return F.layer_norm(x, ln.weight.shape, ln.weight, ln.bias, 1e-5)


class TrainColumn:
    """One way to do a training step on fixed weights."""

    def __init__(
        self,
        name: str,
        loss: Callable[[Tensor, Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        bench: TrainBench,
    ) -> None:
        self.name = name
        self.loss, self.logits = loss, logits
        self.bench = bench
        self.dtype = column_dtype(name, bench.dtype)

    def forward(self, batch: Batch) -> Tensor:
        """The loss; bf16 is autocast over fp32 weights."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.loss(*batch)

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        loss = self.forward(self.bench.batches[0])
        middle = time.perf_counter()
        loss.backward()
        # What is left of the graph is given back inside the timing, and so are the gradients below: real costs of a step.
        del loss
        after = time.perf_counter()
        self.bench.optimizer.step()
        self.bench.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        return {"forward": middle - start, "backward": after - middle, "step": end - start}

    def outcome(self) -> dict[str, Tensor]:
        """The losses of all batches, and the logits and every gradient of the first one."""
        return outcome(self.forward, self.logits, self.bench.weights, self.bench.batches, self.dtype)


def outcome(
    loss: Callable[[Batch], Tensor],
    logits: Callable[[Tensor], Tensor],
    weights: nn.Module,
    batches: Sequence[Batch],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """See TrainColumn.outcome."""
    weights.zero_grad(set_to_none=True)
    first = loss(batches[0])
    first.backward()
    gradients = {}
    for name, p in weights.named_parameters():
        # A parameter that no gradient reached is a finding, not an exception: NaN fails the rule by itself.
        gradients[f"grad {name}"] = torch.full_like(p, math.nan) if p.grad is None else p.grad.detach()
    weights.zero_grad(set_to_none=True)
    losses = [first.detach(), *(loss(batch).detach() for batch in batches[1:])]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        values = logits(batches[0][0])
    return {"losses": torch.stack(losses), "logits": values, **gradients}


class TrainBench:
    """Weights, batches and optimizer of a case: what all of its columns share."""

    def __init__(self, config: Config, dtype: str, backend: str, seed: int = 0) -> None:
        self.config, self.dtype, self.backend = config, dtype, backend
        torch.manual_seed(seed)
        self.weights = GPT(config.model)
        with torch.no_grad():
            for p in self.weights.parameters():
                p.add_(JITTER * torch.randn_like(p))
        size = (BATCHES, 2, config.train.batch, config.model.context)
        self.batches: list[Batch] = [(x, y) for x, y in torch.randint(config.model.vocab_size, size)]
        self.optimizer = make_optimizer(self.weights, config)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def column(self, name: str) -> TrainColumn:
        """One column by its name."""
        if name == "reference":
            return TrainColumn(name, lambda *batch: self.weights(*batch)[1], lambda idx: self.weights(idx)[0], self)
        if name in ("eager", "compile"):
            model = BestEager(self.weights)
            # The compiled column's logits are best eager's: its own function is the loss, which its gradients pin down.
            return TrainColumn(name, compiled(model.loss) if name == "compile" else model.loss, model, self)
        ours = FastGPT.from_reference(self.weights, backend=self.backend)
        return TrainColumn(name, lambda *batch: ours(*batch)[1], lambda idx: ours(idx)[0], self)

    def oracle(self) -> dict[str, Tensor]:
        """The reference in float64."""
        exact = copy.deepcopy(self.weights).double()
        return outcome(
            lambda batch: exact(*batch)[1], lambda idx: exact(idx)[0], exact, self.batches, dtype=torch.float64
        )

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
        self.plain: dict[torch.dtype, dict[str, Tensor]] = {}

    def __call__(self, column: Column) -> list[Row]:
        """One row a quantity."""
        assert isinstance(column, TrainColumn)
        got = column.outcome()
        if column.dtype not in self.plain:
            # The reference is the first column; our fp32 column in a bf16 run needs the reference in fp32.
            reference = column if column.name == "reference" else self.bench.column("reference")
            reference.dtype = column.dtype
            self.plain[column.dtype] = got if reference is column else reference.outcome()
        plain = self.plain[column.dtype]
        return [
            compare(
                name,
                got[name],
                plain[name],
                right,
                dtype=column.dtype,
                factor=factor(column.name, name.startswith("grad ")),
            )
            for name, right in self.oracle.items()
        ]


def bench_case(name: str, options: Options) -> dict[str, object]:
    """Every figure of the training step of one size."""
    config = train_config(name)
    m, B = config.model, config.train.batch
    bench = TrainBench(config, options.dtype, options.backend)
    parameters = sum(p.numel() for p in bench.weights.parameters())
    shape = {"L": m.n_layer, "H": m.n_head, "C": m.n_embd, "T": m.context, "B": B, "V": m.vocab_size}
    case = run_case(
        f"{name} training step " + " ".join(f"{k}={v}" for k, v in shape.items()),
        column_names(options),
        ROWS,
        build=bench.column,
        judge=Gate(bench),
        cost=bench.cost,
        work={"kind": "train", "size": name},
        options=options,
    )
    return {"size": name, "shape": shape, "parameters": parameters, **case}


def bench_train(names: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """The cases of the named sizes, as they are done."""
    for name in names:
        yield bench_case(name, options)


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
    if name == "compile":
        column.run()
    else:
        TrainBench(train_config(TINY), dtype, backend).column(name).run()
    return column, bench.parameter_bytes()
