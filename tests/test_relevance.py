"""relevance_clip_loss: which quantity acts on which direction, and what a relevance does to the gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss, relevance_clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


ONES = torch.ones(30)
R = torch.rand(30, generator=torch.Generator().manual_seed(3)) + 0.5


@pytest.mark.parametrize(("mode", "scope"), [("weight", "anchor"), ("logit", "anchor"), ("logit", "shared")])
def test_a_relevance_of_one_is_clip_loss(pair, mode, scope):
    x, y = pair(30)
    got = relevance_clip_loss(x, y, 10.0, image_relevance=ONES, mode=mode, scope=scope)
    torch.testing.assert_close(got, clip_loss(x, y, 10.0), rtol=1e-6, atol=1e-6)


def test_the_literal_form_has_one_direction(pair):
    x, y = pair(30)
    got = relevance_clip_loss(x, y, 10.0, image_relevance=R, mode="logit", scope="row", raw=True)
    want = F.cross_entropy(R[:, None] * 10.0 * x @ y.T, torch.arange(30))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_closed_form_of_orthonormal_features(scale):
    eye = torch.eye(30, 64)
    got = relevance_clip_loss(eye, eye, scale, image_relevance=R, mode="logit", scope="row", raw=True)
    assert got.item() == pytest.approx(torch.log1p(29 * torch.exp(-R * scale)).mean().item(), rel=1e-5, abs=1e-6)


def test_anchors_scale_their_own_direction(pair):
    x, y = pair(30)
    s, label = 10.0 * x @ y.T, torch.arange(30)
    r = R / R.mean()
    want = (F.cross_entropy(r[:, None] * s, label) + F.cross_entropy((r[None, :] * s).T, label)) / 2
    got = relevance_clip_loss(x, y, 10.0, image_relevance=R, mode="logit")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    shared = (F.cross_entropy(r[:, None] * s, label) + F.cross_entropy((r[:, None] * s).T, label)) / 2
    got = relevance_clip_loss(x, y, 10.0, image_relevance=R, mode="logit", scope="shared")
    torch.testing.assert_close(got, shared, rtol=1e-5, atol=1e-5)
    assert (shared - want).abs() > 1e-3


def test_the_bias_does_not_cancel_where_images_share_their_relevance(pair):
    x, y = pair(30)
    bias = torch.tensor(-2.0, requires_grad=True)
    for scope, cancels in (("anchor", True), ("row", True), ("shared", False)):
        loss = relevance_clip_loss(x, y, 10.0, bias, image_relevance=R, mode="logit", scope=scope)
        assert (torch.autograd.grad(loss, bias)[0] == 0) == cancels


def test_its_size_does_not_matter_unless_raw(pair):
    x, y = pair(30)
    for mode in ("weight", "logit"):
        a, b = (relevance_clip_loss(x, y, 10.0, image_relevance=c * R, mode=mode) for c in (1.0, 7.0))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    raw = relevance_clip_loss(x, y, 10.0, image_relevance=7 * R, mode="logit", raw=True)
    assert (raw - a).abs() > 1e-3


def test_it_is_clamped(pair):
    x, y = pair(30)
    r = torch.ones(30)
    r[0], r[1] = 1000.0, -5.0
    counted = (r.clamp(min=0) / r.clamp(min=0).mean()).clamp(0.25, 4)
    got = relevance_clip_loss(x, y, 10.0, image_relevance=r)
    torch.testing.assert_close(got, clip_loss(x, y, 10.0, image_weights=counted, text_weights=counted))


def test_no_relevance_at_all_warns_and_counts_as_one(pair):
    x, y = pair(30)
    with pytest.warns(UserWarning, match="image_relevance: got no positive value"):
        got = relevance_clip_loss(x, y, 10.0, image_relevance=torch.zeros(30))
    torch.testing.assert_close(got, clip_loss(x, y, 10.0))


def test_a_factor_of_zero_is_chance_and_a_negative_one_repels(pair):
    x, y = pair(30)
    row = {"mode": "logit", "scope": "row", "raw": True}
    loss = relevance_clip_loss(x, y, 10.0, image_relevance=torch.zeros(30), **row)
    assert loss.item() == pytest.approx(math.log(30), rel=1e-6)
    assert not torch.autograd.grad(loss, x)[0].any()
    loss = relevance_clip_loss(x, y, 10.0, image_relevance=-ONES, **row)
    step = torch.autograd.grad(loss, x)[0]
    assert ((-step) * y).sum() < 0  # descent moves images away from their texts


def test_its_gradient_is_that_of_the_formula(pair):
    # mean (E_P s - s_ii), through the normalisation, and the regulariser
    x, y = pair(30)
    r = R.clone().requires_grad_()
    loss = relevance_clip_loss(x, y, 10.0, image_relevance=r, mode="logit", scope="row", relevance_grad=True)
    got = torch.autograd.grad(loss, r)[0]
    q = (R / R.mean()).requires_grad_()
    s = (10.0 * x @ y.T).detach()
    p = (q[:, None] * s).softmax(1).detach()
    at_q = ((p * s).sum(1) - s.diagonal()) / 30 + 0.1 * 2 * q.detach().log() / q.detach() / 30
    want = at_q / R.mean() - (at_q * R).sum() / R.mean() ** 2 / 30
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_it_is_detached_unless_asked(pair):
    x, y = pair(30)
    r = R.clone().requires_grad_()
    loss = relevance_clip_loss(x, y, 10.0, image_relevance=r)
    assert torch.autograd.grad(loss, r, allow_unused=True)[0] is None


def test_a_weight_of_zero_keeps_the_negative(pair):
    x, y = pair(30)
    r = torch.ones(30)
    r[4] = 0
    got = relevance_clip_loss(x, y, 10.0, image_relevance=r, raw=True)
    torch.testing.assert_close(got, clip_loss(x, y, 10.0, image_weights=r, text_weights=r))


REFUSED = [
    ({"mode": "weight", "scope": "row"}, "scope: got 'row' beside mode='weight'"),
    ({"mode": "logit", "scope": "row", "text_relevance": R}, "text_relevance: got a value beside scope='row'"),
    ({"mode": "logit", "scope": "row", "directions": "text"}, "directions: got 'text' beside scope='row'"),
    ({"mode": "logit", "scope": "row", "text_weights": R}, "text_weights: got a value beside scope='row'"),
    ({"relevance_grad": True, "raw": True}, "raw: got True beside relevance_grad=True"),
    ({"relevance_grad": True, "reduction": "none"}, "reduction: got 'none' beside relevance_grad=True"),
    ({"regularizer": 0.01}, "regularizer: got 0.01, wanted a finite number >= 0.1"),
    ({"mode": "logits"}, "mode: got 'logits', wanted one of 'weight', 'logit'"),
    ({"image_relevance": R[:5]}, r"image_relevance: got .*\[5\], wanted shape \[30\]"),
    ({"image_relevance": R.index_fill(0, torch.tensor(3), torch.nan), "check_finite": True}, "image_relevance: got NaN .* row 3"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_what_makes_no_sense_is_named(pair, options, message):
    x, y = pair(30)
    with pytest.raises(ValueError, match=message):
        relevance_clip_loss(x, y, 10.0, **{"image_relevance": R, **options})


def test_a_sample_that_is_taken_out_has_no_part_in_the_mean(pair):
    x, y = pair(6)
    r, ids = torch.tensor([1.0, 2, 1, 1, 3, 1000]), torch.tensor([0, 1, 2, 3, 4, -1])
    for mode in ("weight", "logit"):
        got = relevance_clip_loss(x, y, 10.0, image_relevance=r, image_ids=ids, mode=mode)
        want = relevance_clip_loss(x[:5], y[:5], 10.0, image_relevance=r[:5], mode=mode)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_direction_needs_no_relevance_of_the_other(pair):
    x, y = pair(9, n=5)
    labels = torch.arange(9) % 5
    one = {"labels": labels, "reduction": "none", "mode": "logit"}
    relevance_clip_loss(x, y, 10.0, image_relevance=R[:9], directions="image", **one)
    relevance_clip_loss(x, y, 10.0, image_relevance=R[:9], scope="row", **one)


def test_shared_scores_have_no_cosine_to_filter_by(pair):
    x, y = pair(30)
    rule = fastvlm_loss.filters.absolute(0.1)
    with pytest.raises(ValueError, match="filters: got a value beside scope='shared'"):
        relevance_clip_loss(x, y, 10.0, image_relevance=R, mode="logit", scope="shared", filters=rule)
    with pytest.raises(ValueError, match="image_relevance: got -1, wanted values >= 0"):
        relevance_clip_loss(x, y, 10.0, image_relevance=R.index_fill(0, torch.tensor(3), -1.0), check_finite=True)
