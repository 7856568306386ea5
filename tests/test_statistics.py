"""The engine's statistics beyond what one loss uses: factors, a teacher, the sigmoid total."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlm_loss
from fastvlm_loss.engine import tile
from fastvlm_loss.engine.weights import SUMS
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Hinge, Softmax, decode


def features(m, n, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, y = make(m, d).requires_grad_(), make(n, d).requires_grad_()
    scale, bias = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    factors = (0.5 + make(m).abs()).requires_grad_(), (0.5 + make(n).abs()).requires_grad_()
    return x, y, scale.requires_grad_(), bias.requires_grad_(), *factors, make(m, 4), make(n, 4)


OPTIONS = [(teacher, factor, gap) for teacher in (False, True) for factor in (False, True) for gap in (False, True)]


def statistics(x, y, scale, row, col, options, taught, **given):
    teacher, factor, gap = options
    problem = Problem.of(x, y, scale, **given)
    if factor:
        problem = problem.weighted(row, col)
    if teacher:
        problem = problem.taught(*taught, 0.7)
    t = tile.softmax(problem, gap=gap)
    weight = torch.linspace(0.2, 1.0, t.nll.shape[0], dtype=t.nll.dtype)
    return (t.nll * weight).sum() + (0.0 if t.gap is None else (t.gap * weight.flip(0)).sum())


@pytest.mark.parametrize("options", OPTIONS)
def test_factors_and_teacher_equal_the_dense_score_matrix(options, monkeypatch):
    from fastvlm_loss.backends import torch as chunked

    monkeypatch.setitem(chunked.TILE, "cpu", 5)  # several tiles each way
    for given in ({}, {"image_ids": torch.tensor([0, 0, 1, -1, 2, 2, 2, 3, 4, 5, 6])}):
        x, y, scale, _, row, col, *taught = features(11, 11)
        inputs = (x, y, scale, *((row, col) if options[1] else ()))
        results = []
        for backend in ("dense", "torch"):
            with fastvlm_loss.backend(backend):
                value = statistics(x, y, scale, row, col, options, taught, **given)
                results.append((value, *torch.autograd.grad(value, inputs)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o[0] or o[1]])
def test_factors_and_teacher_pass_gradcheck(options):
    x, y, scale, _, row, col, *taught = features(7, 7)

    def call(x, y, scale, row, col):
        return statistics(x, y, scale, row, col, options, taught)

    with fastvlm_loss.backend("torch"):
        assert torch.autograd.gradcheck(call, (x, y, scale, row, col))


def test_factors_of_one_are_no_factors():
    x, y, scale, *_ = features(9, 9)
    with fastvlm_loss.backend("torch"):
        plain = tile.softmax(Problem.of(x, y, scale)).nll
        assert torch.equal(tile.softmax(Problem.of(x, y, scale).weighted(None, None)).nll, plain)


def test_a_teacher_alike_leaves_no_gradient():
    x, y, scale, *_ = features(9, 9)
    problem = Problem.of(x, y, scale).taught(x.detach(), y.detach(), scale.item())
    with fastvlm_loss.backend("torch"):
        t = tile.softmax(problem)
        found = torch.autograd.grad((t.nll + t.gap).sum(), (x, y))
    for gradient in found:
        assert gradient.abs().max() < 1e-14


def test_a_teacher_of_scale_near_zero_is_label_smoothing():
    x, y, scale, _, _, _, *taught = features(9, 9)
    problem = Problem.of(x, y, scale)
    with fastvlm_loss.backend("torch"):
        uniform = tile.softmax(problem, gap=True).gap
        torch.testing.assert_close(tile.softmax(problem.taught(*taught, 1e-13)).gap, uniform)


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_total_equals_the_dense_score_matrix(weighted, monkeypatch):
    from fastvlm_loss.backends import torch as chunked

    monkeypatch.setitem(chunked.TILE, "cpu", 5)
    for given in ({}, {"image_ids": torch.tensor([0, 0, 1, -1, 2, 2, 2, 3, 4, 5, 6])}):
        x, y, scale, bias, row, col, *_ = features(11, 11)
        results = []
        for backend in ("dense", "torch"):
            with fastvlm_loss.backend(backend):
                problem = Problem.of(x, y, scale, bias, **given)
                problem = problem.weighted(row, col) if weighted else problem
                value, weights = tile.sigmoid(problem), (row, col) if weighted else ()
                results.append((value, *torch.autograd.grad(value, (x, y, scale, bias, *weights))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_sums_of_losses_are_made_only_for_weights_that_are_learned():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, given=(), options=None):
            if called is SUMS:
                needed.append(given[-2:])
            return called(*given, **(options or {}))

    x, y, scale, bias, row, col, *_ = features(9, 9)
    for weights in ((None, None), (row.detach(), None), (row, None), (row.detach(), col), (row, col)):
        needed, learned = [], tuple(w is not None and w.requires_grad for w in weights)
        with Calls(), fastvlm_loss.backend("torch"):
            value = fastvlm_loss.siglip_loss(x, y, scale, bias, image_weights=weights[0], text_weights=weights[1])
            value.backward()
            with torch.no_grad():
                fastvlm_loss.siglip_loss(x, y, scale, bias, image_weights=weights[0], text_weights=weights[1])
        assert needed == ([learned] if any(learned) else [])


def test_sigmoid_gradients_are_made_once_and_scaled():
    x, y, scale, bias, *_ = features(9, 9)
    with fastvlm_loss.backend("torch"):
        value = tile.sigmoid(Problem.of(x, y, scale, bias))
        once = torch.autograd.grad(value, (x, y, scale, bias), retain_graph=True)
        thrice = torch.autograd.grad(3 * value, (x, y, scale, bias))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_large_fp16_batch_does_not_overflow_before_the_mean():
    x = torch.nn.functional.normalize(torch.ones(600, 8), dim=1).half().requires_grad_()
    y = x.detach().clone().requires_grad_()
    with fastvlm_loss.backend("torch"):
        found = torch.autograd.grad(fastvlm_loss.siglip_loss(x, y, 200.0), (x, y))
    for gradient in found:
        assert gradient.dtype == torch.float16
        # all pairs alike: every entry but the 600 targets pulls with sigmoid(200) = 1, so dX = 200 * 599 / 600 * y
        torch.testing.assert_close(gradient.float(), 200 * 599 / 600 * y.detach().float(), rtol=2e-3, atol=0.0)


def test_a_teacher_of_another_size_is_refused():
    x, y, scale, _, _, _, tx, ty = features(5, 5)
    with pytest.raises(ValueError, match=r"teacher_text_features: got torch\.float64"):
        Problem.of(x, y, scale).taught(tx, ty[:4], 1.0)


def test_flags_name_every_statistic():
    options = [f.name for f in fields(Softmax) if f.name not in ("positives", "teacher")]
    for name, positives in itertools.product(options, ("mask", "out", "in")):
        statistic = Softmax(**{name: True}, positives=positives)
        assert decode("softmax", statistic.flags) == statistic
    taught = Softmax(teacher=True)
    assert taught.gap and decode("softmax", taught.flags) == taught
    assert decode("hinge", Hinge(hardest=True, limit=True).flags) == Hinge(hardest=True, limit=True)
    with pytest.raises(ValueError, match="epilogue: got 'softmax' with flags 65536"):
        decode("softmax", 65536)
    with pytest.raises(ValueError, match="epilogue: got 'sigmoid' with flags 3, wanted one of softmax, hinge"):
        decode("sigmoid", 3)


def test_a_learning_teacher_beside_a_bias_of_the_columns_is_refused():
    x, y, scale, _, _, _, tx, ty = features(5, 5)
    problem = replace(Problem.of(x, y, scale).taught(tx.requires_grad_(), ty, 1.0), col_bias=torch.ones(5).double())
    with pytest.raises(ValueError, match="teacher: got tensors that require grad beside a bias of the columns"):
        tile.softmax(problem)
