"""The generator against the known answers of its authors, and its Gumbel numbers against the law."""

import math

import pytest
import torch

from fastvlm_loss.scores.philox import gumbel, halves, philox

# Random123, tests/kat_vectors: philox 4x32 10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in found) == words


def test_counters_broadcast():
    i, j = torch.arange(3)[:, None], torch.arange(5)[None, :]
    words = philox((j, i, 7, 0), halves(1 << 40))
    assert all(w.shape == (3, 5) for w in words)
    alone = philox((j[:, 4:], i[2:], 7, 0), halves(1 << 40))
    assert all(bool(w[2, 4] == a[0, 0]) for w, a in zip(words, alone, strict=True))
    assert len(torch.cat([w.flatten() for w in words]).unique()) == 60


def test_gumbel_numbers_follow_their_law():
    words = philox((torch.arange(100_000), 0, 0, 0), halves(3))
    values = torch.cat([gumbel(w).double() for w in words])
    assert float((values.mean() - 0.5772156649).abs()) < 4 * math.pi / math.sqrt(6 * len(values))
    for at in (-1.0, 0.0, 1.0, 3.0, 6.0):
        wanted = math.exp(-math.exp(-at))
        found = float((values <= at).double().mean())
        assert abs(found - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / len(values)) + 1e-9


def test_gumbel_numbers_are_finite_at_both_ends():
    ends = gumbel(torch.tensor([0, 1, 2**32 - 1]))
    assert ends.isfinite().all() and float(ends[0]) > float(ends[1]) > 21 and float(ends[2]) > -2.9
