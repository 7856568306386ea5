"""What clip_loss must satisfy whatever the backend: closed forms, symmetries, edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import CLIPLoss, clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("b", [2, 5, 64])
def test_closed_forms(b, scale):
    orthonormal = torch.eye(b, 64)
    expected = math.log1p((b - 1) * math.exp(-scale))
    assert clip_loss(orthonormal, orthonormal, scale).item() == pytest.approx(expected, rel=2e-6, abs=5e-7)
    same = F.normalize(torch.ones(b, 8), dim=1)
    assert clip_loss(same, same, scale).item() == pytest.approx(math.log(b), rel=2e-6)
    eps = 0.1
    smoothed = math.log(math.exp(scale) + b - 1) - (1 - eps) * scale - eps * scale / b
    assert clip_loss(orthonormal, orthonormal, scale, label_smoothing=eps).item() == pytest.approx(smoothed, rel=5e-6)
    simplex = F.normalize(torch.eye(b) - 1 / b, dim=1)
    etf = math.log1p((b - 1) * math.exp(-scale * b / (b - 1)))
    assert clip_loss(simplex, simplex, scale).item() == pytest.approx(etf, rel=1e-5, abs=5e-7)


def test_equals_open_clip(pair):
    open_clip = pytest.importorskip("open_clip")
    x, y = pair(200, 64)
    scale = torch.tensor(20.0, requires_grad=True)
    ours, theirs = clip_loss(x, y, scale), open_clip.loss.ClipLoss()(x, y, scale)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    for a, b in zip(gradients(ours, x, y, scale), gradients(theirs, x, y, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


def test_permuting_pairs_permutes_gradients(pair):
    x, y = pair(70)
    order = torch.randperm(70)
    loss, moved = clip_loss(x, y, 10.0), clip_loss(x[order], y[order], 10.0)
    torch.testing.assert_close(loss, moved)
    for a, b in zip(gradients(loss, x, y), gradients(moved, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_swapping_images_and_texts_swaps_the_directions(pair):
    x, y = pair(70)
    torch.testing.assert_close(clip_loss(x, y, 10.0, directions="image"), clip_loss(y, x, 10.0, directions="text"))
    torch.testing.assert_close(clip_loss(x, y, 10.0), clip_loss(y, x, 10.0))


def test_the_bias_cancels_exactly(pair):
    x, y = pair(40)
    bias = torch.tensor(3.0, requires_grad=True)
    loss = clip_loss(x, y, 10.0, bias)
    torch.testing.assert_close(loss, clip_loss(x, y, 10.0), rtol=1e-5, atol=1e-6)
    assert gradients(loss, bias)[0].item() == 0.0


def test_rows_of_the_gradient_tile_sum_to_zero(pair):
    # with equal texts dX = alpha * (sum_j G_ij) y, so it must vanish beside alpha / N
    x, _ = pair(64, 16)
    y = F.normalize(torch.ones(64, 16), dim=1)
    (dx,) = gradients(clip_loss(x, y, 14.3, directions="image"), x)
    assert dx.abs().max() < 1e-6 * 14.3 / 64 * 4


@pytest.mark.parametrize("wanted", range(1, 16))
def test_every_combination_of_requires_grad(pair, wanted):
    x, y = (t.detach() for t in pair(60))
    tensors = [x, y, torch.tensor(8.0), torch.tensor(1.0)]
    full = [t.clone().requires_grad_() for t in tensors]
    reference = gradients(clip_loss(*full), *full)
    some = [t.clone().requires_grad_(bool(wanted >> k & 1)) for k, t in enumerate(tensors)]
    clip_loss(*some).backward()
    for tensor, expected in zip(some, reference, strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, expected)


def test_gradients_are_those_of_a_scaled_loss(pair):
    x, y = pair(64, dtype=torch.bfloat16)
    once = gradients(clip_loss(x, y, 10.0), x)[0]
    scaled = gradients(clip_loss(x, y, 10.0) * 2.0**16, x)[0]
    torch.testing.assert_close(scaled.float() / 2.0**16, once.float())


def test_without_grad_nothing_is_kept(pair):
    x, y = pair(20)
    with torch.no_grad():
        assert not clip_loss(x, y, 10.0).requires_grad


def test_shape_and_kind_of_the_scale(pair):
    x, y = pair(30)
    for scale in (
        torch.tensor([10.0]),
        torch.tensor(10.0, dtype=torch.bfloat16),
        torch.tensor([10.0], dtype=torch.float64),
    ):
        scale.requires_grad_()
        loss = clip_loss(x, y, scale)
        assert loss.shape == () and loss.dtype == torch.float32
        (d,) = gradients(loss, scale)
        assert d.shape == scale.shape and d.dtype == scale.dtype
    torch.testing.assert_close(clip_loss(x, y, 10), clip_loss(x, y, 10.0))


def test_duplicates_by_id_leave_the_candidates(pair):
    x, y = pair(40)
    x2, y2 = torch.cat([x[:39], x[:1]]), torch.cat([y[:39], y[:1]])  # pair 39 repeats pair 0
    ids = torch.arange(40)
    ids[39] = 0
    losses = clip_loss(x2, y2, 10.0, text_ids=ids, reduction="none")
    without = clip_loss(x2[:39], y2[:39], 10.0, reduction="none")
    blind = clip_loss(x2, y2, 10.0, reduction="none")
    torch.testing.assert_close(losses[[0, 39]], without[[0, 0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[1:39], blind[1:39], rtol=1e-5, atol=1e-6)
    assert blind[0] > losses[0] + 0.01


def test_id_minus_one_takes_a_sample_out(pair):
    x, y = pair(40)
    ids = torch.arange(40)
    ids[[3, 17]] = -1
    kept = ids >= 0
    for eps in (0.0, 0.1):
        loss, small = (
            clip_loss(x, y, 10.0, image_ids=ids, label_smoothing=eps),
            clip_loss(x[kept], y[kept], 10.0, label_smoothing=eps),
        )
        torch.testing.assert_close(loss, small, rtol=1e-5, atol=1e-6)
        a, b = gradients(loss, x)[0], gradients(small, x)[0]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a[~kept].abs().max() == 0


def test_weight_zero_keeps_the_negative(pair):
    x, y = pair(30)
    w = torch.ones(30)
    w[5] = 0
    per_image = clip_loss(x, y, 10.0, directions="image", reduction="none")
    expected = per_image[torch.arange(30) != 5].mean()
    torch.testing.assert_close(clip_loss(x, y, 10.0, directions="image", image_weights=w), expected)


def test_weights_are_differentiable(pair):
    x, y = pair(30)
    w = torch.rand(30, requires_grad=True)
    losses = clip_loss(x, y, 10.0, directions="image", reduction="none").detach()
    loss = clip_loss(x, y, 10.0, directions="image", image_weights=w)
    expected = (losses - loss.detach()) / w.detach().sum()
    torch.testing.assert_close(gradients(loss, w)[0], expected, rtol=1e-4, atol=1e-6)


def test_reductions_agree(pair):
    x, y = pair(30)
    none = clip_loss(x, y, 10.0, reduction="none")
    assert none.shape == (30,)
    torch.testing.assert_close(none.sum(), clip_loss(x, y, 10.0, reduction="sum"))
    torch.testing.assert_close(none.mean(), clip_loss(x, y, 10.0))


def test_half_features_are_normalised_in_fp32_and_rounded_once(pair):
    x, y = pair(30, 64, dtype=torch.bfloat16)
    unit = [F.normalize(t.float(), dim=1).bfloat16() for t in (3 * x, y)]
    assert torch.equal(clip_loss(3 * x, y, 10.0, normalize=True), clip_loss(*unit, 10.0))


def test_one_pair_is_exactly_zero():
    x = F.normalize(torch.randn(1, 16), dim=1).requires_grad_()
    loss = clip_loss(x, x.detach().clone(), 100.0)
    assert loss.item() == 0.0
    assert gradients(loss, x)[0].abs().max() < 1e-5


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_empty_batches_give_zero_with_zero_gradients(m, n, eps):
    x, y = torch.randn(m, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    labels = None if m == n else torch.full((m,), -1)
    for ids in (None, True):
        more = {} if ids is None else {"image_ids": torch.zeros(m).long(), "text_ids": torch.zeros(n).long()}
        loss = clip_loss(x, y, scale, labels=labels, label_smoothing=eps, **more)
        assert loss.item() == 0.0
        for g in gradients(loss, x, y, scale):
            assert not g.any() and not g.isnan().any()


def test_no_valid_sample_gives_zero(pair):
    x, y = pair(6)
    loss = clip_loss(x, y, 10.0, image_ids=torch.full((6,), -1))
    assert loss.item() == 0.0
    assert all(not g.any() for g in gradients(loss, x, y))
    loss = clip_loss(x, y, 10.0, image_weights=torch.zeros(6), directions="image")
    assert loss.item() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_features_reach_loss_and_gradients(pair, value):
    x, y = (t.detach() for t in pair(300))
    x[123, 4] = value
    x.requires_grad_()
    loss = clip_loss(x, y, 10.0)
    assert not loss.isfinite()
    assert not gradients(loss, x)[0].isfinite().all()


def test_finite_for_any_finite_score():
    x = torch.full((50, 4), 1e4).requires_grad_()
    y = torch.randn(50, 4) * 1e4
    loss = clip_loss(x, y, 1e4)
    assert loss.isfinite() and gradients(loss, x)[0].isfinite().all()


def test_zero_rows(pair):
    x, y = pair(40)
    x = torch.cat([x[:39], torch.zeros(1, 32)])
    loss = clip_loss(x, y, 100.0)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, y))


def test_non_contiguous_features(pair):
    x, y = pair(40, 64)
    wide, tall = x[:, ::2], y.detach().T.contiguous().T[:, ::2]
    torch.testing.assert_close(clip_loss(wide, tall, 10.0), clip_loss(wide.contiguous(), tall.contiguous(), 10.0))


def test_gradient_keeps_its_digits_as_the_task_gets_easy(pair):
    # the target is subtracted inside the tile before rounding: outside it the error would reach 100 % here
    for noise in (4.0, 2.0):  # mean p_ii from 0.9 to 0.999
        x, y = pair(500, 256, dtype=torch.bfloat16, noise=noise)
        got = gradients(clip_loss(x, y, 100.0), x)[0].double()
        xd, yd = x.detach().double().requires_grad_(), y.detach().double()
        s, label = 100.0 * xd @ yd.T, torch.arange(500)
        exact = gradients((F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2, xd)[0]
        assert (got - exact).norm() < 6e-3 * exact.norm()


def test_same_bits_every_run(pair):
    x, y = pair(3000, 64)
    runs = [(loss := clip_loss(x, y, 20.0), *gradients(loss, x, y)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_makes_half_products_and_fp32_statistics(pair):
    x, y = pair(64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clip_loss(x, y, 10.0)
        assert loss.dtype == torch.float32
        mixed = clip_loss(x.bfloat16(), y, 10.0)  # towers under autocast return either
    assert torch.equal(loss, clip_loss(x.bfloat16(), y.bfloat16(), 10.0))
    assert torch.equal(loss, mixed)
    assert gradients(loss, x)[0].dtype == torch.float32


def test_small_float16_gradients_survive_a_large_batch(pair):
    x, y = pair(2000, 32, dtype=torch.float16)
    with fastvlm_loss.backend("torch"):
        (dx,) = gradients(clip_loss(x, y, 10.0) * 2.0**12, x)
    xd = x.detach().double().requires_grad_()
    label = torch.arange(2000)
    s = 10.0 * xd @ y.detach().double().T
    exact = gradients((F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2 * 2.0**12, xd)[0]
    assert (dx.double() - exact).norm() < 2e-3 * exact.norm()


def test_a_second_derivative_is_refused(pair):
    x, y = pair(10)
    (dx,) = torch.autograd.grad(clip_loss(x, y, 10.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_module_holds_the_functions_options(pair):
    x, y = pair(20)
    module = CLIPLoss(label_smoothing=0.1, directions="image")
    expected = clip_loss(x, y, 10.0, label_smoothing=0.1, directions="image")
    assert torch.equal(module(x, y, 10.0), expected)
    assert torch.equal(module(image_features=x, text_features=y, logit_scale=10.0), expected)
    assert "label_smoothing=0.1" in repr(module)
    with pytest.raises(
        TypeError, match="temperature: got an unknown option of CLIPLoss, wanted one of positives, filters"
    ):
        CLIPLoss(temperature=1)
