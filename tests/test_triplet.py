"""triplet_loss against the published losses, its closed values, and where their gradients vanish."""

import pytest
import torch

import fastvlm_loss
from fastvlm_loss import triplet_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


def vse(x, y, margin, hardest):
    """VSE++ as its code writes it."""
    s = x @ y.T
    own, off = s.diagonal(), ~torch.eye(len(s), dtype=torch.bool)
    to_text, to_image = ((margin + s - d).clamp(min=0) * off for d in (own[:, None], own[None, :]))
    return to_text.amax(1).sum() + to_image.amax(0).sum() if hardest else to_text.sum() + to_image.sum()


def selhn(x, y, margin, epsilon):
    """SelHN as its code writes it."""
    s, n = x @ y.T, len(x)
    off, total = ~torch.eye(n, dtype=torch.bool), 0.0
    for z in (s, s.T):
        h = (margin + z - z.diagonal()[:, None]).clamp(min=0) * off
        near = (z.diagonal() - torch.where(off, z, -9.0).amax(1)).abs() < epsilon
        total = total + torch.where(near, h.sum(1) / (n - 1), h.amax(1)).mean() / 2
    return total


FORMS = {
    "sum": lambda x, y: vse(x, y, 0.2, False),
    "max": lambda x, y: vse(x, y, 0.2, True),
    "selective": lambda x, y: selhn(x, y, 0.2, 0.05),
}


@pytest.mark.parametrize("mining", FORMS)
def test_equals_the_published_loss(pair, mining):
    x, y = pair(60, noise=3.0)
    got, want = triplet_loss(x, y, mining=mining, epsilon=0.05), FORMS[mining](x, y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_published_cases_of_selective(pair):
    x, y = pair(30)
    never = triplet_loss(x, y, mining="selective", epsilon=0.0)
    torch.testing.assert_close(never, triplet_loss(x, y, mining="max") / 60)
    always = triplet_loss(x, y, mining="selective", epsilon=3.0)
    torch.testing.assert_close(always, triplet_loss(x, y) / (60 * 29))


def test_closed_values():
    zero = torch.zeros(8, 4)
    assert triplet_loss(zero, zero, mining="selective").item() == pytest.approx(0.2)
    eye = torch.eye(8)
    for mining in FORMS:
        assert triplet_loss(eye, eye, mining=mining).item() == 0.0
        assert triplet_loss(eye[:1], eye[:1], mining=mining).item() == 0.0  # nobody to compare with


def test_selective_moves_an_image_where_max_cannot():
    # the hardest negative text equals the positive text, under another id: max pulls and pushes along the same vector
    g = torch.Generator().manual_seed(0)
    y = torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=1)
    y[1] = y[0]
    y[2] = torch.nn.functional.normalize(0.98 * y[0] + 0.1 * y[2], dim=0)
    x = y.clone().requires_grad_()
    found = {}
    for mining in ("max", "selective"):
        loss = triplet_loss(x, y, mining=mining, epsilon=0.05, directions="image", reduction="none")
        found[mining] = torch.autograd.grad(loss[0], x)[0][0]
    assert found["max"].abs().max() < 1e-6 and found["selective"].abs().max() > 1e-3


def test_equal_ids_are_no_negatives(pair):
    x, y = pair(20)
    ids = torch.arange(20) // 2
    s, off = x @ y.T, ids[:, None] != ids
    h = (0.2 + s - s.diagonal()[:, None]).clamp(min=0) * off
    got = triplet_loss(x, y, image_ids=ids, directions="image", reduction="none")
    torch.testing.assert_close(got, h.sum(1), rtol=1e-5, atol=1e-5)
    got = triplet_loss(x, y, image_ids=ids, mining="selective", epsilon=3.0, directions="image", reduction="none")
    torch.testing.assert_close(got, h.sum(1) / 18, rtol=1e-5, atol=1e-5)


def test_reductions(pair):
    x, y = pair(20)
    for mining in FORMS:
        each = triplet_loss(x, y, mining=mining, reduction="none")
        torch.testing.assert_close(triplet_loss(x, y, mining=mining, reduction="mean"), each.mean())
        torch.testing.assert_close(triplet_loss(x, y, mining=mining, reduction="sum"), 2 * each.sum())


def test_errors(pair):
    x, y = pair(4)
    with pytest.raises(ValueError, match="mining: got 'hard', wanted one of 'sum', 'max', 'selective'"):
        triplet_loss(x, y, mining="hard")
    with pytest.raises(ValueError, match="reduction: got 'avg'"):
        triplet_loss(x, y, reduction="avg")
    with pytest.raises(ValueError, match=r"text_features: got .*\[4, 3\]"):
        triplet_loss(x, y[:, :3])


@pytest.mark.parametrize("mining", FORMS)
def test_nan_reaches_the_loss_and_nobody_is_no_batch(pair, mining):
    x, y = pair(12)
    bad = x.detach().clone()
    bad[3, 2] = torch.nan
    assert triplet_loss(bad, y, mining=mining).isnan()
    empty = triplet_loss(x[:0], y[:0], mining=mining)
    assert empty.item() == 0.0 and not torch.autograd.grad(empty, x, allow_unused=True)[0].any()
