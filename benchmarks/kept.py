"""What a forward keeps for its backward, found by walking autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an attribute: itself, or what a tuple or list of it holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def held_by(node: Any) -> Iterator[Tensor]:
    """The tensors of one node: those that autograd saved, and those that a Function written in Python holds besides."""
    for name in dir(node):
        if name.startswith("_saved_"):
            yield from tensors_in(getattr(node, name))
    yield from tensors_in(getattr(node, "saved_tensors", ()))
    for value in getattr(node, "__dict__", {}).values():
        yield from tensors_in(value)


class Kept:
    """Counts bytes, each piece of memory once; what is there anyway (inputs, parameters) is not counted."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        # The tensors are kept alive while counting: memory that is given back could come again as another tensor's.
        self.seen = {t.untyped_storage().data_ptr(): t for t in there}
        self.visited: set[Any] = set()

    def add(self, outputs: Iterable[Tensor]) -> int:
        """Bytes that the graph behind the outputs keeps and that no earlier call has counted."""
        total = 0
        waiting = [y.grad_fn for y in outputs]
        while waiting:
            node = waiting.pop()
            if node is None or node in self.visited:
                continue
            self.visited.add(node)
            waiting += [following for following, _ in node.next_functions]
            for tensor in held_by(node):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self.seen:
                    self.seen[storage.data_ptr()] = tensor.detach()
                    total += storage.nbytes()
        return total
