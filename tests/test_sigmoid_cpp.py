"""The sweep of the C++ library where the matrix does not reach: weights, easy pairs, what is not needed, threads."""

import math
from dataclasses import replace

import pytest
import torch

from fastvlm_loss.backends import cpp, dense
from fastvlm_loss.engine.ops import SWEEP
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Sigmoid

pytestmark = pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable())
ALL = (True, True, True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def sweep(problem, *need):
    return SWEEP["cpp"](*(None if t is None else t.detach() for t in problem.tensors()), *need)


def exact(problem):
    """Total and gradients of the same problem in fp64."""
    fields = [t.detach().double() if t is not None and t.is_floating_point() else t for t in problem.tensors()]
    wanted = [t.requires_grad_() for t in fields[:4]]
    total = dense.total(Problem(*fields), Sigmoid())
    return (total.detach(), *torch.autograd.grad(total, wanted))


def weights(n, seed):
    # zeros and both signs: a weight may be anything
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return torch.where(w.abs() < 0.2, 0.0, w)


@DTYPES
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (33, 70), (1600, 130)])
def test_weights(pair, m, n, ids, dtype):
    x, y = pair(m, 24, n=n, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    options = {"labels": torch.randint(-1, n, (m,), generator=g)}
    if ids:
        options |= {f"{k}_ids": torch.randint(-1, 9, (s,), generator=g) for k, s in (("image", m), ("text", n))}
    p = Problem.of(x, y, 8.0, -3.0, **options).weighted(weights(m, 2), weights(n, 3))
    # what cancels leaves the rounding of its parts; as sigmoid < softplus, the unsigned total bounds sums of G and G c
    parts = exact(p.weighted(p.row_factor.abs(), p.col_factor.abs()))
    for k, (got, want) in enumerate(zip(sweep(p, *ALL), exact(p), strict=True)):
        size = parts[k if k in (1, 2) else 0].abs().max()
        assert (got.double() - want).abs().max() <= 8 * torch.finfo(got.dtype).eps * max(size, 1e-3), k


@DTYPES
def test_one_side_of_weights(pair, dtype):
    p, w, ones = Problem.of(*pair(40, 8, dtype=dtype), 5.0, -1.0), weights(40, 2), torch.ones(40)
    for row, col in ((w, None), (None, w)):
        given = sweep(replace(p, row_factor=row, col_factor=col), *ALL)
        whole = sweep(p.weighted(ones if row is None else row, ones if col is None else col), *ALL)
        assert all(torch.equal(a, b) for a, b in zip(given, whole, strict=True))


@pytest.mark.parametrize(("scale", "bias"), [(160.0, -80.0), (60.0, -30.0), (20.0, -10.0), (1e-3, -10.0)])
def test_easy_pairs_keep_their_digits(scale, bias):
    # targets with a score of -bias, all others with that of bias: the loss is tiny, or tiny entries by the thousand
    n = 1000
    x = torch.eye(n)
    total = sweep(Problem.of(x, x, scale, bias), False, False, False)[0].item()
    own, other = (math.log1p(math.exp(s)) for s in (-(scale + bias), bias))
    assert total == pytest.approx(n * own + n * (n - 1) * other, rel=1e-6, abs=0)


@DTYPES
def test_what_is_not_needed_is_empty_and_changes_nothing(pair, dtype):
    p = Problem.of(*pair(500, 40, n=500, dtype=dtype), 10.0, -5.0)
    whole = sweep(p, *ALL)
    for need_x, need_y, need_scale in ((True, False, False), (False, True, False), (False, False, True)):
        total, dx, dy, *rest = sweep(p, need_x, need_y, need_scale)
        assert torch.equal(total, whole[0])
        for needed, got, want in ((need_x, dx, whole[1]), (need_y, dy, whole[2])):
            assert torch.equal(got, want) if needed else got.numel() == 0
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))
    total, dx, dy, *_ = sweep(p, False, False, False)
    assert torch.equal(total, whole[0])
    assert dx.numel() == dy.numel() == 0


@DTYPES
def test_threads_do_not_change_a_bit(pair, dtype):
    p = Problem.of(*pair(1700, 40, n=1700, dtype=dtype), 20.0, -10.0)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sweep(p, *ALL))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@DTYPES
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_sum(m, n, dtype):
    x, y = torch.randn(m, 8).to(dtype), torch.randn(n, 8).to(dtype)
    p = Problem.of(x, y, 10.0, -10.0, labels=torch.full((m,), -1))
    total, dx, dy, *rest = sweep(p, *ALL)
    assert not total and not dx.any() and not dy.any() and not any(rest)
    assert dx.shape == x.shape and dy.shape == y.shape


def test_nan_reaches_the_loss_and_a_removed_one_does_not(pair):
    x, y = (t.detach() for t in pair(50, 8))
    x[7, 3] = torch.nan
    assert sweep(Problem.of(x, y, 10.0, -10.0), *ALL)[0].isnan()
    ids = torch.arange(50).where(torch.arange(50) != 7, -1)
    p = Problem.of(x, y, 10.0, -10.0, image_ids=ids)
    assert sweep(p, *ALL)[0].isfinite()
