"""Hard negatives: their order, what is never picked; the same on every backend and in any tiling."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import BatchNegatives, FeatureQueue, LinearHardness, backend, clip_loss, filters, hard_negatives
from fastvlm_loss import triplet_loss as triplet
from fastvlm_loss.backends import cpp
from fastvlm_loss.backends import torch as chunked

BACKENDS = ["dense", "torch", pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp.unavailable()), reason="no C++"))]
INF = math.inf


def unit(n, d, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1).to(dtype)


def lattice(n, d, seed=0):
    """Features whose products are exact in any order of summation, with many ties."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def picked(found):
    return [
        found.text_index,
        found.text_score,
        found.text_valid,
        found.image_index,
        found.image_score,
        found.image_valid,
    ]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(picked(a), picked(b), strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 7, 3), (97, 97, 5), (300, 500, 8), (130, 70, 64)])
def test_without_noise_it_is_the_top_k_of_the_masked_matrix(name, m, n, k):
    x, y = unit(m, 24), unit(n, 24, 1)
    labels = torch.arange(m) % n
    scores = x @ y.T
    scores[torch.arange(m), labels] = -INF
    with backend(name):
        found = hard_negatives(x, y, k, hardness=INF, scale=2.0, labels=labels)
    for axis, index, score, valid in (
        (1, found.text_index, found.text_score, found.text_valid),
        (0, found.image_index, found.image_score, found.image_valid),
    ):
        most = min(k, scores.shape[axis])
        values = scores.topk(most, axis).values.movedim(axis, 1)
        there = values > -INF
        assert torch.equal(valid[:, :most], there) and not valid[:, most:].any()
        torch.testing.assert_close(score[:, :most][there], 2 * values[there])
        assert bool((index[~valid] == -1).all()) and bool((score[~valid] == 0).all())
        own = (scores if axis else scores.T).gather(1, index.clamp(min=0))
        torch.testing.assert_close(own[valid], score[valid] / 2)


@pytest.mark.parametrize("name", BACKENDS)
def test_ties_go_to_the_lowest_index(name):
    x, y = lattice(90, 3), lattice(90, 3, 1)
    scores = (x @ y.T).fill_diagonal_(-INF)
    with backend(name):
        found = hard_negatives(x, y, 7, hardness=INF, scale=1.0)
    assert torch.equal(found.text_index, scores.sort(dim=1, descending=True, stable=True).indices[:, :7])
    assert torch.equal(found.image_index, scores.sort(dim=0, descending=True, stable=True).indices[:7].T)


OPTIONS = {
    "drawn": {},
    "uniform": {"hardness": 0.0},
    "greedy": {"hardness": INF},
    "ids": {"image_ids": torch.arange(150) // 3},
    "floor": {"floor": 1e-3},
    "limit": {"filters": filters.relative(0.5)},
    "guide": {"filters": [filters.guide(unit(150, 5, 8), unit(150, 5, 9)), filters.absolute(0.3)]},
    "far": {"seed": 2**40 + 1, "step": 2**33 + 7},
    "invalid": {"image_ids": torch.arange(150).masked_fill(torch.arange(150) % 4 == 0, -1)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_backends_agree_on_every_index(option):
    x, y = lattice(150, 5) / 8, lattice(150, 5, 1) / 8
    given = {"seed": 5, "step": 3, **OPTIONS[option]}
    with backend("dense"):
        wanted = hard_negatives(x, y, 6, **given)
    for name in ("torch", "cpp"):
        if name == "cpp" and cpp.unavailable():
            continue
        with backend(name):
            found = hard_negatives(x, y, 6, **given)
        for a, b in zip(picked(found), picked(wanted), strict=True):
            # a key that another rounding changes may change places; the numbers themselves agree
            differ = a != b if not a.is_floating_point() else (a - b).abs() > 1e-5
            assert float(differ.float().mean()) < 0.005, name


def test_the_same_bits_in_any_tiling(monkeypatch):
    x, y = lattice(130, 6) / 8, lattice(130, 6, 1) / 8
    results = []
    for tile in (16, 33, 1024):
        monkeypatch.setitem(chunked.TILE, "cpu", tile)
        with backend("torch"):
            results.append(hard_negatives(x, y, 5, seed=1, step=2, image_ids=torch.arange(130) // 2))
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.skipif(bool(cpp.unavailable()), reason="no C++")
def test_the_same_bits_for_any_number_of_threads():
    x, y = unit(1700, 32), unit(1900, 32, 1)
    labels, before, results = torch.arange(1700), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(hard_negatives(x, y, 9, seed=1, step=2, labels=labels))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_part_of_the_batch_draws_as_it_does_in_the_whole(name):
    # the noise is of the global place: what the first rows draw does not depend on how many there are
    x, y = lattice(60, 4) / 4, lattice(60, 4, 1) / 4
    with backend(name):
        whole = hard_negatives(x, y, 3, seed=4, step=1, labels=torch.arange(60))
        part = hard_negatives(x[:20], y, 3, seed=4, step=1, labels=torch.arange(20))
    assert torch.equal(whole.text_index[:20], part.text_index)


def test_a_step_and_a_seed_are_other_draws():
    x, y = unit(64, 8), unit(64, 8, 1)
    one = hard_negatives(x, y, seed=0, step=0)
    for seed, step in ((1, 0), (0, 1), (0, 2**32)):
        assert float((hard_negatives(x, y, seed=seed, step=step).text_index != one.text_index).float().mean()) > 0.3
    assert same(one, hard_negatives(x, y, seed=0, step=torch.tensor(0)))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_positive_at_rank_three_is_never_picked(name):
    # topk(5)[:, 1:] would throw away the hardest negative here and label the positive 0
    y = torch.eye(8)
    x = y + 2.0 * torch.roll(y, 1, 0) + 1.5 * torch.roll(y, 2, 0)
    with backend(name):
        found = hard_negatives(x, y, 4, hardness=INF)
    every = torch.arange(8)
    assert torch.equal(found.text_index[:, 0], (every - 1) % 8) and torch.equal(found.text_index[:, 1], (every - 2) % 8)
    assert not (found.text_index == every[:, None]).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_where_every_pair_is_a_duplicate_there_are_none(name):
    with backend(name):
        found = hard_negatives(
            unit(9, 4), unit(9, 4, 1), 2, seed=0, step=0, image_ids=torch.zeros(9, dtype=torch.int64)
        )
    assert not found.text_valid.any() and not found.image_valid.any() and bool((found.text_index == -1).all())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (0, 0), (0, 5), (5, 0)])
def test_a_batch_of_one_or_none(name, m, n):
    labels = torch.full((m,), -1) if m != n else None
    with backend(name):
        found = hard_negatives(unit(m, 4), unit(n, 4), 3, seed=0, step=0, labels=labels)
    assert found.text_index.shape == (m, 3) and found.image_index.shape == (n, 3)
    assert not found.text_valid.any() and not found.image_valid.any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("law", [{}, {"hardness": INF}, {"floor": 1e-2}])
def test_what_is_not_finite_is_excluded_and_counted(name, bad, law):
    x, y = unit(12, 4), unit(12, 4, 1)
    x[3, 1], y[5] = bad, math.nan
    with backend(name):
        found = hard_negatives(x, y, 20, seed=0, step=0, **law)
    assert int(found.nonfinite) == 2 and int(found.text_valid.sum()) == 10 * 10 + 11
    assert found.image_in.tolist() == [i != 3 for i in range(12)]
    assert found.text_in.tolist() == [i != 5 for i in range(12)]
    assert not (found.text_index == 5).any() and not found.image_valid[5].any()
    assert not (found.image_index == 3).any() and not found.text_valid[3].any()
    assert bool(found.text_score.isfinite().all()) and bool(found.image_score.isfinite().all())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_floor_beside_a_queue_does_not_overflow(name):
    x, y = unit(64, 16), unit(64, 16, 1)
    queue = FeatureQueue(64, 16)
    queue.push(F.normalize(x + 0.01 * unit(64, 16, 2), dim=1))  # leads the batch by far more than fp32's exponent
    with backend(name):
        found = hard_negatives(x, y, scale=400.0, floor=1e-4, queue=queue, seed=0, step=0)
        alone = hard_negatives(
            x, y, 3, floor=1e-4, queue=queue, seed=0, step=0, image_ids=torch.zeros(64, dtype=torch.int64)
        )
    assert bool((found.text_index[:, 0] >= 64).all())
    assert bool(alone.text_valid.all()) and bool((alone.text_index >= 64).all())  # the batch itself has no candidate


@pytest.mark.parametrize("name", BACKENDS)
def test_a_saturated_row_still_has_its_negatives(name):
    # softmax-then-zero-the-diagonal underflows here, and multinomial fails
    x = F.normalize(torch.eye(10) + 1e-3, dim=1)
    with backend(name):
        found = hard_negatives(x, x, 4, scale=1e4, seed=0, step=0)
        floored = hard_negatives(x, x, 4, scale=1e4, floor=1e-4, seed=0, step=0)
    assert bool(found.text_valid.all()) and bool(floored.image_valid.all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x, y = (lattice(40, 4, s).to(dtype) / 4 for s in (0, 1))
    found, wanted = (hard_negatives(a, b, 3, seed=0, step=0) for a, b in ((x, y), (x.float(), y.float())))
    assert torch.equal(found.text_index, wanted.text_index) and found.text_score.dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("hardness", [1.0, INF])
@pytest.mark.parametrize("options", [{}, {"image_ids": torch.arange(77) // 2}, {"filters": filters.absolute(0.1)}])
def test_beside_a_loss_it_is_the_same(name, hardness, options):
    x, y = lattice(77, 6) / 8, lattice(77, 6, 1) / 8
    x.requires_grad_()
    with backend(name):
        wanted = hard_negatives(x, y, 4, hardness=hardness, seed=7, step=1, **options)
        alone = clip_loss(x, y, 20.0, 1.0, **options)
        alone_grad = torch.autograd.grad(alone, x)[0]
        hinges = triplet(x, y, **options)
        negatives, others = (BatchNegatives(4, hardness=hardness, seed=7, step=1) for _ in range(2))
        value = clip_loss(x, y, 20.0, 1.0, negatives=negatives, **options)
        grad = torch.autograd.grad(value, x)[0]
        assert torch.equal(triplet(x, y, negatives=others, **options), hinges)
    assert same(negatives.found, wanted) and same(others.found, wanted)
    assert torch.equal(value, alone) and torch.equal(grad, alone_grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_queue_is_more_candidates(name):
    x, y, old = lattice(30, 5) / 4, lattice(30, 5, 1) / 4, lattice(20, 5, 2) / 4
    texts = FeatureQueue(25, 5)
    with backend(name):
        alone = hard_negatives(x, y, 5, seed=1, step=2)
        assert same(hard_negatives(x, y, 5, seed=1, step=2, queue=texts), alone)  # empty
        texts.push(old)
        found = hard_negatives(x, y, 5, seed=1, step=2, queue=texts)
        both = hard_negatives(x, torch.cat([y, old]), 5, seed=1, step=2, labels=torch.arange(30))
        assert torch.equal(found.text_index, both.text_index) and bool((found.text_index >= 30).any())
        assert torch.equal(found.image_index, alone.image_index)
        images = FeatureQueue(20, 5)
        images.push(old)
        mirrored = hard_negatives(x, y, 5, seed=1, step=2, queue=(images, None))
        assert torch.equal(mirrored.text_index, alone.text_index) and bool((mirrored.image_index >= 30).any())


def test_a_queue_entry_with_the_anchors_id_is_never_picked():
    x, y = unit(10, 4), unit(10, 4, 1)
    queue = FeatureQueue(10, 4, max_age=3)
    queue.push(x, torch.arange(10), step=5)  # each image's own double
    for step, there in ((6, True), (9, False)):
        found = hard_negatives(x, y, 40, hardness=INF, step=step, image_ids=torch.arange(10), queue=queue)
        assert not (found.text_index == torch.arange(10)[:, None] + 10).any()
        assert bool((found.text_index >= 10).any()) == there


def test_hardness_may_follow_a_schedule():
    schedule = LinearHardness(steps=1000, most=2.0, ramp=0.2)
    assert [schedule(s) for s in (0, 100, 200, 1000)] == [0.0, 1.0, 2.0, 2.0]
    x, y = unit(20, 4), unit(20, 4, 1)
    assert same(
        hard_negatives(x, y, seed=0, step=50, hardness=schedule), hard_negatives(x, y, seed=0, step=50, hardness=0.5)
    )


def test_harder_is_harder():
    x, y = unit(400, 16), unit(400, 16, 1)
    scores = (x @ y.T).fill_diagonal_(-INF)
    rank = scores.argsort(1, descending=True).argsort(1)
    means = []
    for hardness in (0.0, 0.5, 1.0, 3.0, INF):
        index = hard_negatives(x, y, hardness=hardness, seed=0, step=0).text_index
        means.append(float(rank.gather(1, index).float().mean()))
    assert means == sorted(means, reverse=True) and means[-1] == 0 and 150 < means[0] < 250


def test_it_compiles_and_takes_no_gradient():
    x, y = unit(40, 8).requires_grad_(), unit(40, 8, 1).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, y, at):
        found = hard_negatives(x, y, 3, seed=2, step=at)
        return found.text_index, found.text_score

    index, score = step(x, y, torch.tensor(4))
    wanted = hard_negatives(x, y, 3, seed=2, step=4)
    assert torch.equal(index, wanted.text_index) and not score.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0, wanted at least 1"),
        ({"k": 65}, "k: got 65, wanted at most 64"),
        ({"hardness": -1.0}, "hardness: got -1.0"),
        ({"hardness": 1e39}, "hardness: got 1e\\+39"),
        ({"floor": 1e39}, "floor: got 1e\\+39"),
        ({"scale": 1e39}, "scale: got 1e\\+39"),
        ({"step": torch.tensor(True)}, "step: got a bool tensor"),
        ({"queue": FeatureQueue(4, 4, max_age=1), "hardness": INF, "step": None}, "step: got None beside a queue"),
        ({"seed": None}, "seed: got None beside hardness=1.0"),
        ({"step": None}, "step: got None"),
        ({"step": -1}, "step: got -1"),
        ({"seed": 2**63}, "seed: got"),
        ({"floor": -0.1}, "floor: got -0.1"),
        ({"floor": 0.1, "hardness": INF}, "floor: got 0.1 beside hardness=inf"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"queue": "no"}, "queue: got str"),
        ({"queue": FeatureQueue(4, 7)}, "queue: got texts of D = 7, wanted 4"),
        ({"group": 1}, "group: got int"),
        ({"labels": torch.tensor([9] * 6)}, "labels: got 9"),
        ({"hardness": LinearHardness(10), "step": torch.tensor(1)}, "step: got Tensor beside a schedule"),
        ({"image_ids": torch.zeros(5)}, "image_ids: got"),
    ],
)
def test_errors_are_named(options, message):
    given = {"seed": 0, "step": 0, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        hard_negatives(unit(6, 4), unit(6, 4, 1), **given)


def test_errors_beside_a_loss_are_named():
    x, y = unit(6, 4), unit(6, 4, 1)
    for options, message in (
        ({"negatives": 3}, "negatives: got int"),
        ({"negatives": BatchNegatives(seed=0, step=0), "directions": "image"}, "negatives: got them beside directions"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            clip_loss(x, y, 10.0, **options)
