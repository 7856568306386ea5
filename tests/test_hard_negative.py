"""hard_negative_clip_loss: closed values, limits, and the published formulation."""

import math

import pytest
import torch

import fastvlm_loss
from fastvlm_loss import clip_loss, hard_negative_clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


def scenic(s, beta, alpha=1.0):
    """HN-NCE as published: weights of mean 1 over the negatives, both directions averaged."""
    n = len(s)
    off = ~torch.eye(n, dtype=torch.bool)
    total = 0.0
    for z in (s, s.T):
        w = torch.where(off, beta * z, -torch.inf).softmax(1) * (n - 1)
        own = z.diagonal()
        total = total - torch.log(own.exp() / (alpha * own.exp() + (w * z.exp()).sum(1))).mean() / 2
    return total


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_equals_the_published_formulation(pair, beta, alpha):
    x, y = (t.detach().double().requires_grad_() for t in pair(30))
    want = scenic(10.0 * x @ y.T, beta, alpha)
    x32, y32 = x.detach().float().requires_grad_(), y.detach().float().requires_grad_()
    got = hard_negative_clip_loss(x32, y32, 10.0, beta=beta, alpha_pos=alpha)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got, (x32, y32)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_beta_zero_is_clip_loss(pair):
    x, y = pair(30)
    torch.testing.assert_close(
        hard_negative_clip_loss(x, y, 10.0, beta=0.0), clip_loss(x, y, 10.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("beta", [0.0, 1.0, 30.0])
def test_equal_negatives_make_every_beta_clip_loss(beta):
    eye = torch.eye(9, 16)
    torch.testing.assert_close(hard_negative_clip_loss(eye, eye, 3.0, beta=beta), clip_loss(eye, eye, 3.0))


def test_an_infinite_beta_leaves_the_hardest(pair):
    x, y = pair(30)
    s = 10.0 * x @ y.T
    away = s - torch.diag(torch.full((30,), torch.inf))
    want = sum(
        (torch.logaddexp(s.diagonal(), math.log(29) + z.amax(1)) - s.diagonal()).mean() / 2 for z in (away, away.T)
    )
    got = hard_negative_clip_loss(x, y, 10.0, beta=1e4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_detached_weights_never_attract(pair):
    # dl/ds_ij = pi_i q_ij >= 0 detached; with gradient through the weights easy negatives are pulled in
    y = torch.eye(6, 8)
    x = torch.tensor([[0.5, 0.4, 0.0, -0.4, -0.4, -0.4, 0.0, 0.0]]).expand(6, 8).clone().requires_grad_()
    pulls = []
    for detach in (True, False):
        loss = hard_negative_clip_loss(
            x, y, 3.0, beta=2.0, detach_weights=detach, directions="image", reduction="none"
        )  # fmt: skip
        pulls.append(torch.autograd.grad(loss[0], x)[0][0, 1:6])
    assert (pulls[0] >= 0).all() and pulls[1].min() < -1e-4 < 0 < pulls[1].max()


def test_debiased_is_that_of_the_formula(pair):
    x, y = pair(30)
    s, tau, n = 5.0 * x @ y.T, 0.05, 29
    off = ~torch.eye(30, dtype=torch.bool)
    want = 0.0
    for z in (s, s.T):
        total = torch.where(off, z.exp(), 0.0).sum(1)
        total = torch.maximum((total - tau * n * z.diagonal().exp()) / (1 - tau), n * torch.tensor(-5.0).exp())
        want = want + (torch.log(z.diagonal().exp() + total) - z.diagonal()).mean() / 2
    got = hard_negative_clip_loss(x, y, 5.0, beta=0.0, tau_plus=tau)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_where_the_negatives_are_all_false_the_floor_counts():
    eye = torch.eye(4, 8)
    x = eye.clone().requires_grad_()
    bias = torch.tensor(0.5, requires_grad=True)
    loss = hard_negative_clip_loss(x, eye, 20.0, bias, beta=0.0, tau_plus=0.5)
    # n exp(-scale + bias) over exp(scale + bias)
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-40.0)), abs=1e-7)
    assert torch.autograd.grad(loss, (x, bias))[1].abs() < 1e-6


def test_a_sample_without_negatives_is_dropped(pair):
    x, y = pair(10)
    one = hard_negative_clip_loss(x[:1], y[:1], 10.0)
    assert one.item() == 0.0
    same = hard_negative_clip_loss(x, y, 10.0, image_ids=torch.zeros(10).long())
    assert same.item() == 0.0 and not torch.autograd.grad(same, x)[0].any()
    ids = torch.arange(10)
    ids[8:] = -1
    got = hard_negative_clip_loss(x, y, 10.0, image_ids=ids)
    torch.testing.assert_close(got, hard_negative_clip_loss(x[:8], y[:8], 10.0), rtol=1e-5, atol=1e-6)


def test_finite_at_a_large_scale(pair):
    x, y = pair(50)
    loss = hard_negative_clip_loss(x, y, 1e4, beta=1.0)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


def test_errors(pair):
    x, y = pair(4)
    for change, message in (
        ({"beta": -1}, "beta: got -1"),
        ({"tau_plus": 1.0}, "tau_plus"),
        ({"alpha_pos": -0.1}, "alpha_pos"),
    ):
        with pytest.raises(ValueError, match=message):
            hard_negative_clip_loss(x, y, 1.0, **change)


def test_an_empty_batch_is_zero_and_infinity_is_not_hidden(pair):
    x, y = pair(6)
    for tau in (0.0, 0.1):
        assert hard_negative_clip_loss(x[:0], y[:0], 10.0, tau_plus=tau).item() == 0.0
        bad = x.detach().clone()
        bad[3, 2] = torch.inf
        assert not hard_negative_clip_loss(bad, y, 10.0, tau_plus=tau).isfinite()
