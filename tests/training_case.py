"""A small run to train in tests: its settings, a batch, gradients."""

import torch

from model.config import resolve

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n"


def small_settings(folder):
    """Overrides of the preset tiny: 12 steps of eight sequences on a small text in the folder."""
    path = folder / "text.txt"
    path.write_text("".join(TEXT[i % 7 :] for i in range(60)))
    small = ["n_embd=16", "batch=8", "steps=12", "warmup=0", "eval_every=12", "eval_batches=1", "sample_tokens=0"]
    return [f"data={path}", f"out={folder}", "threads=1", *small]


def chosen(settings, *more):
    return resolve("tiny", [*settings, *more])[0]


def some_batch(vocabulary, ignored):
    """Eight sequences; the second half has lost most of its targets, the last two all of them."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(vocabulary, (8, 16), generator=rng)
    y = torch.randint(vocabulary, (8, 16), generator=rng)
    if ignored:
        y[4:, 3:] = -100
        y[6:] = -100
    return x, y


def gradients(learner, x, y, micro):
    learner.optimizer.zero_grad(set_to_none=True)
    learner.micro = micro
    loss = learner.gradients(0, x, y)
    return {"loss": loss} | {name: p.grad for name, p in learner.model.named_parameters()}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def same_values(a, b):
    """Whether two values of a checkpoint are equal bit for bit, however they are nested."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return a == b
