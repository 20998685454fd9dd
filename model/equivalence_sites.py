"""Where the fast model calls an operator, in the order of its forward, and a way to put another function there.

The fast model finds its operators by name in model/fast.py. While `tapped` is open each call is handed to a function of
the caller's choice: to look at its inputs (model/equivalence_operators.py), to take the reference's operator instead
(model/equivalence_bisect.py), or a wrong one (model/equivalence_faults.py). No kernel is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from model import fast
from model.config import ModelConfig

Operator = Callable[..., Any]

# The tensor arguments of each operator by position, as the parts of a result are called.
ARGUMENTS = {
    "layer_norm": ("x", "weight", "bias"),
    "linear": ("x", "weight", "bias"),
    "causal_attention_packed": ("qkv",),
    "gelu_mlp": ("x", "w_fc", "b_fc", "w_proj", "b_proj"),
    "linear_cross_entropy": ("x", "weight", "targets"),
}
OPERATORS = tuple(ARGUMENTS)


@dataclass(frozen=True)
class Site:
    """One call of an operator in a forward; layer is that of its block, L for what follows the last one."""

    name: str
    operator: str
    layer: int

    def __str__(self) -> str:
        return f"{self.name} ({self.operator})"


# What runs at a site, given the library's own operator.
Choice = Callable[[Site, Operator], Operator]


def as_it_is(site: Site, operator: Operator) -> Operator:
    """The choice that changes nothing."""
    return operator


def block_sites(layer: int) -> list[Site]:
    """The calls between the norm of a block's input and its MLP."""
    calls = [
        ("attn.c_attn", "linear"),
        ("attn", "causal_attention_packed"),
        ("attn.c_proj", "linear"),
        ("ln_2", "layer_norm"),
        ("mlp", "gelu_mlp"),
    ]
    return [norm_site(layer), *(Site(f"h.{layer}.{name}", operator, layer) for name, operator in calls)]


def norm_site(layer: int) -> Site:
    """The first norm of a block."""
    return Site(f"h.{layer}.ln_1", "layer_norm", layer)


def forward_sites(config: ModelConfig, with_loss: bool = True) -> list[Site]:
    """Every call of a forward that returns logits, and the loss as well unless told otherwise."""
    L = config.n_layer
    sites = [site for layer in range(L) for site in block_sites(layer)]
    sites += [Site("ln_f", "layer_norm", L), Site("lm_head", "linear", L)]
    return sites + ([Site("loss", "linear_cross_entropy", L)] if with_loss else [])


@contextmanager
def tapped(sites: Sequence[Site], choose: Choice) -> Iterator[None]:
    """While open, the calls of model/fast.py go, one after the other, to what `choose` puts at the sites.

    Any number of forwards may follow each other, all of them with the same sites.
    """
    originals: dict[str, Operator] = {name: getattr(fast, name) for name in OPERATORS}
    places = cycle(sites)

    def hook(name: str) -> Operator:
        def call(*args: Any, **kwargs: Any) -> Any:
            site = next(places)
            if site.operator != name:
                raise RuntimeError(
                    f"the fast model calls {name} where check expects {site}: a model whose parts were changed needs "
                    "block_sites in model/equivalence_sites.py to list its calls, in their order"
                )
            return choose(site, originals[name])(*args, **kwargs)

        return call

    try:
        for name in OPERATORS:
            setattr(fast, name, hook(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(fast, name, original)
