"""The same GPT on gptkernels: the reference's own Parameter objects, other forwards.

Against model/reference.py: attention reads the packed projection (B, T, 3, H, D) where it lies; each residual addition
is made inside the LayerNorm that follows it, so the stream is read and written once; the MLP is one operator; the loss
is taken from the last hidden state: of the (B*T, V) logits of a training step one chunk is held at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels import causal_attention_packed, gelu_mlp, layer_norm, linear, linear_cross_entropy
from gptkernels.backend import resolve
from gptkernels.ops.attention.api import choose
from model.backends import by_operator
from model.config import ModelConfig
from model.reference import (
    GPT,
    MLP,
    Attention,
    Block,
    Seed,
    attention_seed,
    check_input,
    dropout,
    dropout_seed,
    sinusoidal_positions,
)


class TiedLookUp(torch.autograd.Function):
    """Rows of a tied table, and the table for the head: one gradient for both uses.

    Autograd would make a second table for the gradient of the look-up, zero it and add the two; here the rows are added to
    the head's gradient, in its place.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dtable: Tensor) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        words, rows = idx.flatten(), drows.flatten(0, 1)
        if dtable.is_cuda:  # where index_add_ is in any order, and this in the order of the tokens
            return dtable.index_put_((words,), rows, accumulate=True), None
        return dtable.index_add_(0, words, rows), None


class FastGPT(nn.Module):
    """A GPT with the reference's parameters, names and initial weights, computed by gptkernels.

    backend is one of its backends, or one for each operator: "triton,causal_attention:cuda" (model/backends.py).

    Its modules only hold the parameters: their own forwards and hooks are not called, so that a module put in the place of
    one changes nothing but the weights. To compute a part in another way, override attend, think or block in a subclass.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, *, backend: str = "auto", parameters_of: GPT | None = None) -> None:
        """Build from a configuration, or around the parameters of a reference model: shared, not copied."""
        super().__init__()
        source = GPT(config) if parameters_of is None else parameters_of
        self.config = config
        self.backend = backend
        self.transformer = source.transformer
        self.lm_head = source.lm_head
        if config.pos == "sinusoidal":
            table = sinusoidal_positions(config.context, config.n_embd)
            self.register_buffer("positions", table.to(self.lm_head.weight), persistent=False)

    @classmethod
    def from_reference(cls, reference: GPT, *, backend: str = "auto") -> FastGPT:
        """The fast model of a reference: the very same Parameter objects, so that a step of one is a step of both."""
        return cls(reference.config, backend=backend, parameters_of=reference).train(reference.training)

    def to_reference(self) -> GPT:
        """The reference of this model, on the very same Parameter objects and in the same mode.

        Of a subclass too, whose own methods it does not have: what they compute in another way it is the check of.
        """
        with torch.device("meta"):  # its own weights are thrown away: give them no memory and draw no random numbers
            reference = GPT(self.config)
        reference.transformer, reference.lm_head = self.transformer, self.lm_head
        return reference.train(self.training)

    @property
    def backend(self) -> str:
        """What is asked for, in one text; `asked` has it by operator."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._backend, self.asked = backend, by_operator(backend)

    def backends(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """The backend that each operator gets where the weights are, in dtype (theirs if not given); raises as they do."""
        weight = self.lm_head.weight
        heads = torch.empty(
            0, self.config.n_embd // self.config.n_head, dtype=dtype or weight.dtype, device=weight.device
        )
        # Attention also looks at the width of a head.
        return {
            operator: (choose if operator == "causal_attention" else resolve)(asked, heads)
            for operator, asked in self.asked.items()
        }

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        seed: Seed | None = None,
        return_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss): the logits (B, T, words) without targets, the loss with them, and both when return_logits.

        idx and targets are (B, T) int64; a target of -100 is ignored. seed draws the dropout of a training step, the
        same masks as the reference's: needed, and used, only in train mode with dropout > 0.
        """
        check_input(idx, targets, self.config)
        rows, weight = self.look_up(idx)
        hidden = self.hidden(rows, dropout_seed(self.config.dropout, self.training, seed))
        words = None if self.config.outputs == self.config.vocab_size else self.config.outputs
        logits = None
        if targets is None or return_logits:
            logits = linear(hidden, weight[:words], backend=self.asked["linear"])
        if targets is None:
            return logits, None
        flat = hidden.flatten(0, 1), weight, targets.flatten()
        loss = linear_cross_entropy(*flat, vocab_size=words, backend=self.asked["linear_cross_entropy"])
        return logits, loss

    def hidden(self, rows: Tensor, seed: Seed | None) -> Tensor:
        """(B, T, C): what the head reads, from the tokens' embeddings."""
        x, branch = self.block(0, self.drop(self.add_positions(rows), seed, 0), None, seed)
        for layer in range(1, self.config.n_layer):
            x, branch = self.block(layer, x, branch, seed)
        last = self.transformer.ln_f
        return layer_norm(branch, last.weight, last.bias, residual=x, backend=self.asked["layer_norm"])[0]

    def block(self, layer: int, x: Tensor, branch: Tensor | None, seed: Seed | None) -> tuple[Tensor, Tensor]:
        """Block number `layer`: the residual stream x and the branch to be added to it, from those of the block before.

        It uses the parameters of its own block alone. h is the normalised value of the stream.
        """
        block, backend = cast("Block", self.transformer.h[layer]), self.asked["layer_norm"]
        if branch is None:
            h = layer_norm(x, block.ln_1.weight, block.ln_1.bias, backend=backend)
        else:
            h, x = layer_norm(branch, block.ln_1.weight, block.ln_1.bias, residual=x, backend=backend)
        branch = self.drop(self.attend(block.attn, h, layer, seed), seed, 2 * layer + 1)
        h, x = layer_norm(branch, block.ln_2.weight, block.ln_2.bias, residual=x, backend=backend)
        return x, self.drop(self.think(block.mlp, h), seed, 2 * layer + 2)

    def look_up(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' rows (B, T, C) of the embedding table, and the table that the head multiplies by."""
        table = self.transformer.wte.weight
        tied_on_cpu = self.config.tie and table.device.type == "cpu"
        # A compiled graph serves any number of tokens: it must not ask how many there are. torch.func would have TiedLookUp
        # in another form.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if tied_on_cpu and not traced and table.shape[0] > idx.numel():
            return TiedLookUp.apply(table, idx)
        return F.embedding(idx, table), self.lm_head.weight

    def add_positions(self, x: Tensor) -> Tensor:
        """(B, T, C): token plus position."""
        T = x.shape[1]
        if self.config.pos == "learned":
            table = self.transformer.wpe.weight
            # The gradient of a slice is a zero-filled copy of the table: the whole table is taken where it can be. Not in a
            # graph, which would then serve this length alone.
            whole = not torch.compiler.is_compiling() and table.shape[0] == T
            return x + (table if whole else table[:T])
        return x + self.positions[:T] if self.config.pos == "sinusoidal" else x

    def drop(self, x: Tensor, seed: Seed | None, stream: int) -> Tensor:
        """The reference's residual dropout, or x itself where nothing is dropped."""
        return x if seed is None else dropout(x, self.config.dropout, seed, stream)

    def attend(self, attn: Attention, h: Tensor, layer: int, seed: Seed | None) -> Tensor:
        """(B, T, C): the attention branch of a block."""
        B, T, C = h.shape
        H, p = self.config.n_head, self.config.dropout
        backend, dense = self.asked["causal_attention"], self.asked["linear"]
        qkv = linear(h, attn.c_attn.weight, attn.c_attn.bias, backend=dense).view(B, T, 3, H, C // H)
        if seed is None:
            out = causal_attention_packed(qkv, backend=backend)
        else:
            out = causal_attention_packed(qkv, dropout_p=p, seed=attention_seed(seed, layer), backend=backend)
        # A backend may leave the heads in any order of strides; contiguous is free where they are in place already.
        return linear(out.reshape(B, T, C), attn.c_proj.weight, attn.c_proj.bias, backend=dense)

    def think(self, mlp: MLP, h: Tensor) -> Tensor:
        """(B, T, C): the MLP branch of a block."""
        fc, proj = mlp.c_fc, mlp.c_proj
        approximate = "tanh" if self.config.act == "gelu_tanh" else "none"
        backend = self.asked["gelu_mlp"]
        return gelu_mlp(h, fc.weight, fc.bias, proj.weight, proj.bias, approximate=approximate, backend=backend)


Model = GPT | FastGPT
