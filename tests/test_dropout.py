"""The random numbers of attention's dropout: Philox itself, and the masks that it draws."""

import itertools
import math

import pytest
import torch

from gptkernels.ops.attention import reference


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_share_of_kept_weights(p):
    shape = (3, 5, 64, 64)
    masks = [reference.dropout_keep(torch.tensor(seed), p, shape) for seed in (0, 1, 2**32)]
    for keep in masks:
        assert abs(keep.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
    planes = [keep[b, h] for keep in masks for b in range(3) for h in range(5)]
    for one, other in itertools.combinations(planes, 2):  # every seed, batch and head draws its own
        agreement = (one == other).double().mean()
        expected = p * p + (1 - p) * (1 - p)
        assert abs(agreement - expected) < 6 * math.sqrt(expected * (1 - expected) / one.numel())


@pytest.mark.parametrize(
    "key, counter, words",
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    """The test vectors that Random123 publishes with the generator."""
    found = reference.philox(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
    assert tuple(word.item() for word in found) == words
