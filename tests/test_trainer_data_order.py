"""The order of samples: permutations, exact mixtures, stand-ins for bad rows, and batches without equal captions."""

from collections import Counter

import numpy as np
import pytest

from fastvlm_loss.trainer.data.order import Order, apart, dice, shares


def order(sizes, weights=None, batch_size=16, seed=0, **options):
    ids = [np.arange(n) for n in sizes]
    return Order(
        [f"source {k}" for k in range(len(sizes))], ids, weights or [1.0] * len(sizes), batch_size, seed, **options
    )


@pytest.mark.parametrize(
    "batch_size, weights, expected",
    [
        (64, (80, 20), [51, 13]),
        (64, (0.8, 0.2), [51, 13]),
        (10, (1, 1, 1), [4, 3, 3]),
        (7, (0.5, 0, 0.5), [4, 0, 3]),
        (5, (3,), [5]),
        (100, (0.335, 0.335, 0.33), [34, 33, 33]),
    ],
)
def test_shares_by_largest_remainder(batch_size, weights, expected):
    assert shares(batch_size, weights) == expected


def test_every_batch_has_its_shares_in_a_drawn_order():
    mixed = order((500, 90), (80, 20), 64)
    places = np.zeros(64)
    seen = [[], []]
    for step in range(200):
        source, number = mixed.rows(step)
        assert Counter(source.tolist()) == {0: 51, 1: 13}
        places += source
        for k in (0, 1):
            seen[k].append(number[source == k])
    assert np.abs(places / 200 - 13 / 64).max() < 4.5 * (13 / 64 * 51 / 64 / 200) ** 0.5  # of 64 places
    for k, (n, count) in enumerate(((500, 51), (90, 13))):
        for epoch in range(3):
            part = np.concatenate(seen[k][epoch * (n // count) : (epoch + 1) * (n // count)])
            assert len(set(part.tolist())) == len(part) == n // count * count


def test_whole_batches_of_one_source():
    mixed = order((100, 60, 40), (6, 0, 4), 20, mix="batch")
    rows = [mixed.rows(step) for step in range(1000)]
    of = np.array([source[0] for source, _ in rows])
    assert all((source == source[0]).all() for source, _ in rows) and set(of.tolist()) == {0, 2}
    assert abs((of == 0).sum() - 600) < 4 * (1000 * 0.24) ** 0.5
    for k, per_epoch in ((0, 5), (2, 2)):
        turns = [number for (source, number) in rows if source[0] == k]
        for at in range(0, 10 * per_epoch, per_epoch):
            assert len(set(np.concatenate(turns[at : at + per_epoch]).tolist())) == 20 * per_epoch


def test_sources_of_one_size_are_walked_in_different_orders():
    source, number = order((50, 50), batch_size=50).rows(0)
    assert not np.array_equal(np.sort(number[source == 0]), np.sort(number[source == 1]))


@pytest.mark.parametrize("mix", ["sample", "batch"])
def test_a_step_needs_none_before_it(mix):
    forwards = order((100, 60), (2, 1), mix=mix, seed=4)
    expected = [forwards.rows(step) for step in range(5000, 5020)]
    for step in (19, 0, 7):
        source, number = order((100, 60), (2, 1), mix=mix, seed=4).rows(5000 + step)
        assert (source == expected[step][0]).all() and (number == expected[step][1]).all()
    other = order((100, 60), (2, 1), mix=mix, seed=5).rows(5000)
    assert not (other[1] == expected[0][1]).all()


@pytest.mark.parametrize("n, batch_size", [(40, 8), (41, 8), (9, 6), (12, 12)])
def test_a_stand_in_is_found_wherever_the_good_samples_are(n, batch_size):
    one = order((n,), batch_size=batch_size)
    _, number = one.rows(3)
    for row in (0, batch_size - 1):
        tried = [one.spare(3, row, attempt) for attempt in range(1, n)]
        assert sorted([*tried, int(number[row])]) == list(range(n))
    firsts = [one.spare(3, row, 1) for row in range(batch_size)]
    assert len(set(firsts)) == batch_size
    if n >= 2 * batch_size:
        assert not set(firsts) & set(number.tolist())


def test_a_stand_in_comes_from_the_same_source():
    mixed = order((50, 30), (3, 1), 16)
    source, _ = mixed.rows(2)
    own = {k: set(mixed.rows(3)[1][mixed.rows(3)[0] == k].tolist()) for k in (0, 1)}
    for row in range(16):
        assert mixed.spare(2, row, 1) in own[int(source[row])]  # both are within their epoch: those of the next batch


def test_batches_without_equal_captions():
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(0, 60, 600), np.arange(100, 700)])
    plain = Order(["a"], [ids], [1.0], 40, 1)
    one = Order(["a"], [ids], [1.0], 40, 1, no_duplicates=True)
    twice = [len(np.unique(ids[plain.rows(step)[1]])) < 40 for step in range(30)]
    assert sum(twice) > 25
    rows = [one.rows(step)[1] for step in range(30)]
    assert all(len(np.unique(ids[number])) == 40 for number in rows[:25])
    assert sorted(np.concatenate(rows).tolist()) == list(range(1200))


def test_captions_that_cannot_be_kept_apart_fill_up():
    ids = np.array([0] * 90 + list(range(1, 31)))
    shuffled = np.random.default_rng(0).permutation(120)
    moved = apart(shuffled, ids[shuffled], 12)
    assert sorted(moved.tolist()) == list(range(120))
    assert (apart(shuffled, np.arange(120), 12) == shuffled).all()
    few = apart(np.arange(7), np.zeros(7, np.int64), 3)
    assert sorted(few.tolist()) == list(range(7))


def test_drawn_numbers_are_uniform_and_depend_on_their_key():
    drawn = dice(7, 3, range(5000), 2, 6)
    assert drawn.shape == (5000, 6) and drawn.min() > 0 and drawn.max() < 1
    assert (np.abs(drawn.mean(0) - 0.5) < 4 * (1 / 12 / 5000) ** 0.5).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 4 / 5000**0.5
    assert (dice(7, 3, [40, 11], 2, 6) == drawn[[40, 11]]).all()
    for other in (dice(8, 3, [0], 2), dice(7, 4, [0], 2), dice(7, 3 + 2**32, [0], 2), dice(7, 3, [0], 1)):
        assert not np.isin(other, drawn[0]).any()


def test_a_source_that_gets_no_row_is_named():
    with pytest.raises(ValueError, match=r"batch_size: got 16, which takes 0 rows of source 1 at weight 0\.01"):
        order((50, 50), (1, 0.01))
    with pytest.raises(ValueError, match="which takes 16 rows of source 0 at weight 1, wanted 1 to 10"):
        order((10, 50), mix="batch")
    order((10, 50), (0.0, 1.0), mix="batch")
    with pytest.raises(ValueError, match=r"weights: got \[0.0, 0.0\]"):
        order((50, 50), (0.0, 0.0))
