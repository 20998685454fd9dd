"""GPT by hand, from torch's tensors alone: the page to read, and the oracle that the fast model is measured against.

    tokens -> embedding + position -> [x + attention(norm(x)); x + mlp(norm(x))] * L -> norm -> head -> logits

Every formula is written out, in whatever dtype the parameters have (float64 for the oracle). Parameters carry GPT-2's
names and nn.Linear's layout, weight (out, in). The last part of the page draws the dropout masks: Philox keyed on absolute
positions, so that any implementation, in any order of work, can draw the same ones.

Sizes: B batch, T tokens, C width, H heads, D = C/H, F = 4C, V vocabulary, L layers.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Vaswani et al. 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.config import ModelConfig

WORD = 0xFFFF_FFFF
SEED_MASK = 0x7FFF_FFFF_FFFF_FFFF
IGNORE_INDEX = -100
# The key of dropout's masks: a number, or a 0-d int64 tensor, which a compiled graph takes as one more input.
Seed = int | Tensor


def weight_std(width: int) -> float:
    """Standard deviation of a block's initial weights: GPT-2's 0.02 at its widths, from 768 on.

    Below, what keeps the variance of a layer's output that of width 768, whose inputs are normalised: the sum over fewer
    inputs asks for larger weights (the reasoning of Glorot & Bengio 2010, section 4.2.1).
    """
    return 0.02 * math.sqrt(768 / min(width, 768))


class Embedding(nn.Module):
    """Row idx of a (rows, C) table."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=0.02))

    def forward(self, idx: Tensor) -> Tensor:
        return self.weight[idx]


class Linear(nn.Module):
    """x W^T + b."""

    def __init__(self, width_in: int, width_out: int, bias: bool, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias over the last dimension, with the biased variance."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        y = centred / torch.sqrt(variance + 1e-5) * self.weight
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Causal multi-head self-attention: softmax(q k^T / sqrt(D), over the past) v in each head."""

    def __init__(self, config: ModelConfig, residual_std: float) -> None:
        super().__init__()
        self.n_head, self.p = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias, weight_std(config.n_embd))
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, residual_std)

    def forward(self, x: Tensor, seed: Seed | None) -> Tensor:
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        if seed is not None:
            keep = attention_keep(seed, self.p, (B, H, T), x.device)
            weights = weights * keep * (1.0 / (1.0 - self.p))
        out = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(out)


def gelu(x: Tensor, act: str) -> Tensor:
    """x * P(normal <= x), by erf or by GPT-2's tanh formula (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    if act == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class MLP(nn.Module):
    """gelu(x W_fc^T + b_fc) W_proj^T + b_proj, four times as wide inside."""

    def __init__(self, config: ModelConfig, residual_std: float) -> None:
        super().__init__()
        self.act = config.act
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias, weight_std(config.n_embd))
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x), self.act))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): norms before, so that the residual stream stays free."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        # 2L additions keep the stream's variance that of one.
        residual_std = weight_std(config.n_embd) / math.sqrt(2 * config.n_layer)
        self.layer, self.p = layer, config.dropout
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = Attention(config, residual_std)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config, residual_std)

    def forward(self, x: Tensor, seed: Seed | None) -> Tensor:
        attended = self.attn(self.ln_1(x), None if seed is None else attention_seed(seed, self.layer))
        x = x + (attended if seed is None else dropout(attended, self.p, seed, 2 * self.layer + 1))
        thought = self.mlp(self.ln_2(x))
        return x + (thought if seed is None else dropout(thought, self.p, seed, 2 * self.layer + 2))


class Transformer(nn.Module):
    """The parameters between tokens and head, under GPT-2's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.wpe = Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)


class GPT(nn.Module):
    """A decoder-only transformer language model; the initial weights come from torch's global random state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be positive to build a model, got 0: set it, or take it from the data")
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, seed: Seed | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, words) of the next token at each position, and the mean cross-entropy when targets are given.

        idx and targets are (B, T) int64; a target of -100 is ignored. seed draws the dropout of a training step: it is
        needed, and used, only in train mode with dropout > 0.
        """
        check_input(idx, targets, self.config)
        seed = dropout_seed(self.config.dropout, self.training, seed)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))
        elif self.config.pos == "sinusoidal":
            x = x + sinusoidal_positions(idx.shape[1], self.config.n_embd, x.device).to(x.dtype)
        if seed is not None:
            x = dropout(x, self.config.dropout, seed, 0)
        for block in self.transformer.h:
            x = block(x, seed)
        logits = self.lm_head(self.transformer.ln_f(x))[..., : self.config.outputs]  # without the table's padding
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows whose target is not -100 of logsumexp(row) - row[target]; logits (N, V), targets (N,)."""
    used = targets != IGNORE_INDEX
    target_logit = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.logsumexp(logits, dim=1) - target_logit
    return torch.where(used, losses, 0.0).sum() / used.sum()


def sinusoidal_positions(T: int, C: int, device: torch.device | None = None) -> Tensor:
    """(T, C) float64: sin(t / 10000^(2i/C)) at even columns 2i, the cosine at odd ones, times 0.02 sqrt(2).

    The factor gives a row the root mean square 0.02 of a freshly initialised token embedding. The paper reaches the
    same balance by multiplying the embedding by sqrt(C).
    """
    t = torch.arange(T, device=device, dtype=torch.float64)[:, None]
    angle = t / 10000.0 ** (torch.arange(0, C, 2, device=device, dtype=torch.float64) / C)
    return 0.02 * math.sqrt(2.0) * torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def check_input(idx: Tensor, targets: Tensor | None, config: ModelConfig) -> None:
    """Raise unless idx and targets are (B, T) with 1 <= T <= context and, where a look costs little, hold known tokens."""
    context, V = config.context, config.outputs
    if idx.dim() != 2 or not 1 <= idx.shape[1] <= context:
        raise ValueError(f"idx must be (B, T) with 1 <= T <= context = {context}, got {tuple(idx.shape)}: crop it")
    if targets is not None and targets.shape != idx.shape:
        shapes = f"{tuple(targets.shape)} for {tuple(idx.shape)}"
        raise ValueError(f"targets must have the shape of idx, one for each token, got {shapes}: shift, then crop both")
    # A GPU would be waited for, and a graph has no values yet: there torch's own checks remain.
    if idx.device.type != "cpu" or torch.compiler.is_compiling() or idx.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(idx))
    if low < 0 or high >= config.vocab_size:
        wanted = f"tokens must be in [0, {config.vocab_size})"
        raise ValueError(f"{wanted}, got {low if low < 0 else high}: take the tokenizer that the model was made for")
    if targets is not None:
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != IGNORE_INDEX)]
        if wrong.numel():
            rule = f"targets must be in [0, {V}), or {IGNORE_INDEX} to be ignored"
            raise ValueError(f"{rule}, got {int(wrong[0])}: take the tokenizer that the model was made for")


def dropout_seed(p: float, training: bool, seed: Seed | None) -> Seed | None:
    """The seed to drop by, or None where nothing is dropped."""
    if p == 0.0 or not training:
        return None
    if seed is None:
        raise ValueError(f"dropout {p} in train mode needs seed=, a number for this step: pass one, or call eval()")
    return seed & SEED_MASK


def dropout(x: Tensor, p: float, seed: Seed, stream: int) -> Tensor:
    """x with elements dropped at rate p and the rest scaled by 1/(1-p).

    The element at flat index i looks at word i % 4 of counter (i // 4 low, i // 4 high, stream, 0).
    """
    quads = torch.arange((x.numel() + 3) // 4, device=x.device)
    zero = torch.zeros_like(quads)
    words = philox(seed, (quads & WORD, quads >> 32, zero + stream, zero))
    keep = keep_rule(torch.stack(words, dim=-1).flatten()[: x.numel()].view(x.shape), p)
    return x * keep * (1.0 / (1.0 - p))


def attention_seed(seed: Seed, layer: int) -> Seed:
    """The key of one layer's attention dropout: steps of 2^64 / golden ratio, so that no two layers share a mask."""
    return (seed + (0x9E3779B97F4A7C15 * (layer + 1) & SEED_MASK)) & SEED_MASK


def attention_keep(seed: Seed, p: float, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """(B, H, T, T) bool, True where kept: element (b, h, row, col) looks at word col % 4 of counter (col // 4, row, h, b)."""
    B, H, T = shape
    quads, rows, heads, batches = (torch.arange(n, device=device) for n in ((T + 3) // 4, T, H, B))
    words = philox(seed, (quads, rows[:, None], heads[:, None, None], batches[:, None, None, None]))
    return keep_rule(torch.stack(words, dim=-1).flatten(-2)[..., :T], p)


def keep_rule(words: Tensor, p: float) -> Tensor:
    """Which values survive: a word is below floor(p * 2^32) with probability p."""
    return words >= math.floor(p * 2**32)


def philox(seed: Seed, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each 128-bit counter: Philox4x32-10 (Salmon et al. 2011), words held in int64.

    The int64 product of two 32-bit words wraps, but its 64 bits are right: the high word is a shift and a mask away.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3
