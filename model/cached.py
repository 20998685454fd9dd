"""Generation by keeping: each token's keys and values are made once, and every later token attends to them.

Without that a token costs a forward of all tokens before it. Once the text is longer than the context its window slides, with
that every position, and nothing can be kept any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels import causal_attention, linear
from model.fast import FastGPT
from model.reference import Attention, Seed, check_input


class CachedGPT(FastGPT):
    """A FastGPT, on the very same parameters, that keeps the keys and values of the tokens it was last asked about.

    What they were made with may change between calls, the weights in place too: then they are made anew.
    """

    def __init__(self, model: FastGPT) -> None:
        super().__init__(model.config, backend=model.backend, parameters_of=model.to_reference())
        self.origin = (model,)  # no module of this one
        self.known: Tensor | None = None  # those tokens (T,)
        self.made_with: tuple | None = None
        self.first = 0  # how many of them are not computed again
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, (1, H, context, D)

    @torch.no_grad()
    def after(self, tokens: Tensor) -> Tensor:
        """Logits (words,) of the token after tokens (T,), 1 <= T <= context.

        Where the tokens are the last call's and more, only those that are new are computed.
        """
        check_input(tokens[None], None, self.config)
        before, self.known = self.known, None  # nothing, should this call be broken off
        if (now := self.circumstances()) != self.made_with:
            self.made_with, self.kept, before = now, [], None
        more = before is not None and len(before) < len(tokens) and torch.equal(before, tokens[: len(before)])
        self.first = len(before) if before is not None and more else 0
        rows, table = self.look_up(tokens[None, self.first :])
        last = self.hidden(rows, None)[0, -1:]
        self.known = tokens.clone()
        return linear(last, table[: self.config.outputs], backend=self.asked["linear"])[0]

    def circumstances(self) -> tuple:
        """All but the tokens that keys and values depend on, and whether they may be written to."""
        weight = self.lm_head.weight
        device = weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # A tensor that was made in inference mode counts no changes.
        versions = (None if p.is_inference() else p._version for p in self.parameters())
        return torch.is_inference_mode_enabled(), autocast, weight.dtype, weight.device, *versions

    def add_positions(self, x: Tensor) -> Tensor:
        """(1, T, C): token plus position, counted from the first that is kept."""
        places = slice(self.first, self.first + x.shape[1])
        if self.config.pos == "learned":
            return x + self.transformer.wpe.weight[places]
        return x + self.origin[0].positions[places] if self.config.pos == "sinusoidal" else x

    def attend(self, attn: Attention, h: Tensor, layer: int, seed: Seed | None) -> Tensor:
        """(1, T, C): the attention branch of new tokens, over all that are kept and themselves."""
        B, T, C = h.shape
        H, context, end = self.config.n_head, self.config.context, self.first + T
        if context == T:  # whose next window begins with another token
            return super().attend(attn, h, layer, seed)
        dense = self.asked["linear"]
        qkv = linear(h, attn.c_attn.weight, attn.c_attn.bias, backend=dense).view(B, T, 3, H, C // H)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        if layer == len(self.kept):
            self.kept.append((k.new_empty(B, H, context, C // H), v.new_empty(B, H, context, C // H)))
        keys, values = self.kept[layer]
        keys[:, :, self.first : end], values[:, :, self.first : end] = k, v
        # The queries are the last T of `end` tokens, each of which sees the keys up to its own.
        out = causal_attention(q, keys[:, :, :end], values[:, :, :end], backend=self.asked["causal_attention"])
        return linear(out.transpose(1, 2).reshape(B, T, C), attn.c_proj.weight, attn.c_proj.bias, backend=dense)
