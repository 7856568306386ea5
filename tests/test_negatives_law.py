"""The law of hard negatives: chi-square of many draws against the softmax, without replacement, in both directions."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import backend, hard_negatives
from fastvlm_loss.backends import cpp

BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp.unavailable()), reason="no C++"))]


def unit(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def chi_square(counts, expected):
    """Statistic over its number of degrees of freedom."""
    used = expected > 5
    return float(((counts - expected)[used] ** 2 / expected[used]).sum() / (used.sum() - 1))


COPIES = 20_000  # of each row, or column: as many independent draws from one call


def draws(k, **options):
    """Counts `[6, 6, ...]` of what `COPIES` copies of 6 images draw among 6 texts, and of 6 texts among 6 images."""
    x, y, every = unit(6, 4), unit(6, 4, 1), torch.arange(6)
    many = every.repeat(COPIES)
    texts = hard_negatives(x[many], y, k, labels=many, seed=3, step=1, **options).text_index
    images = hard_negatives(
        x, y[many], k, labels=every, image_ids=every, text_ids=many, seed=3, step=1, **options
    ).image_index
    counts = []
    for index in (texts, images):
        flat = many
        for picked_index in index.T:
            flat = flat * 6 + picked_index
        counts.append(torch.bincount(flat, minlength=6 ** (k + 1)).reshape((6,) * (k + 1)))
    return x @ y.T, *counts


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", BACKENDS)
def test_one_negative_follows_the_softmax_in_both_directions(hardness, name):
    with backend(name):
        products, texts, images = draws(1, hardness=hardness, scale=2.5)
    for counts, s in ((texts, products), (images, products.T)):
        weights = (hardness * 2.5 * s).exp().fill_diagonal_(0)
        assert not counts.diagonal().any() and int(counts.sum()) == 6 * COPIES
        # 24 degrees of freedom: 1.9 is exceeded once in 200
        assert chi_square(counts, COPIES * weights / weights.sum(1, keepdim=True)) < 1.9


@pytest.mark.parametrize(("k", "hardness"), [(2, 0.0), (2, 1.0), (2, 2.0), (3, 1.0)])
@pytest.mark.parametrize("name", BACKENDS)
def test_several_negatives_are_drawn_without_replacement(name, k, hardness):
    with backend(name):
        products, texts, images = draws(k, hardness=hardness, scale=3.0)
    for counts, s in ((texts, products), (images, products.T)):
        weights = (hardness * 3.0 * s).exp().fill_diagonal_(0)
        expected = torch.zeros_like(counts, dtype=torch.float64)
        for i in range(6):  # Plackett-Luce
            for order in itertools.permutations([j for j in range(6) if j != i], k):
                left, chance = float(weights[i].sum()), 1.0
                for j in order:
                    chance, left = chance * float(weights[i, j]) / left, left - float(weights[i, j])
                expected[(i, *order)] = chance
        assert not counts[expected == 0].any()
        assert chi_square(counts, COPIES * expected) < 1.5  # 114 degrees of freedom, or 354


@pytest.mark.parametrize("name", BACKENDS)
def test_a_floor_is_blips_mixture(name):
    with backend(name):
        products, texts, _ = draws(1, scale=4.0, floor=0.05)
    # the softmax has the positive in it; that of a text in the copies is over the six images likewise
    weights = ((4.0 * products).softmax(1) + 0.05).fill_diagonal_(0)
    assert chi_square(texts, COPIES * weights / weights.sum(1, keepdim=True)) < 1.9
