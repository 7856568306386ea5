"""margin_clip_loss: the margin's size for far and near texts, and what it never does."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss, filters, margin_clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


def dense(x, y, scale, t, m, a):
    r = t @ t.T
    mu = (m * (1 - r) / (1 - a)).clamp(max=m) if a < 1 else torch.full_like(r, m)
    s, label = scale * (x @ y.T + mu.fill_diagonal_(0.0)), torch.arange(len(x))
    return (F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2


@pytest.mark.parametrize("a", [-0.5, 0.3, 0.9, 1.0, 2.0])
def test_equals_the_equation(pair, a):
    x, y = pair(40)
    t = pair(40, 8, seed=9)[0].detach()
    scale = torch.tensor(12.0, requires_grad=True)
    got = margin_clip_loss(x, y, scale, text_embeddings=t, threshold=a)
    want = dense(x, y, scale, t, 0.2, a)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a_, b in zip(torch.autograd.grad(got, (x, y, scale)), torch.autograd.grad(want, (x, y, scale)), strict=True):
        torch.testing.assert_close(a_, b, rtol=1e-4, atol=1e-5)


def test_the_default_threshold_is_the_70th_percentile(pair):
    x, y = pair(40)
    t = pair(40, 8, seed=9)[0].detach()
    a = (t @ t.T).flatten().sort().values[int(0.7 * 1600) - 1].item()
    torch.testing.assert_close(
        margin_clip_loss(x, y, 12.0, text_embeddings=t), margin_clip_loss(x, y, 12.0, text_embeddings=t, threshold=a)
    )


def test_texts_that_mean_the_same_get_no_margin(pair):
    x, y = pair(20)
    same = torch.ones(20, 4) / 2
    torch.testing.assert_close(
        margin_clip_loss(x, y, 10.0, text_embeddings=same, threshold=0.5), clip_loss(x, y, 10.0), rtol=1e-5, atol=1e-5
    )


def test_no_margin_is_clip_loss(pair):
    x, y = pair(20)
    t = pair(20, 8, seed=9)[0]
    torch.testing.assert_close(margin_clip_loss(x, y, 10.0, text_embeddings=t, margin=0.0), clip_loss(x, y, 10.0))


def test_labels_put_each_image_at_its_text(pair):
    x, y = pair(9, n=5)
    t = pair(5, 8, seed=9)[0].detach()
    labels = torch.tensor([0, 4, 4, -1, 2, 1, 0, 3, 2])
    r = t[labels.clamp(min=0)] @ t.T
    mu = (0.2 * (1 - r) / 0.5).clamp(max=0.2)
    hit = labels[:, None] == torch.arange(5)
    s = 10.0 * (x @ y.T + mu.masked_fill(hit, 0.0))
    want = F.cross_entropy(s[labels >= 0], labels[labels >= 0])
    got = margin_clip_loss(x, y, 10.0, labels=labels, text_embeddings=t, threshold=0.5, directions="image")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_composes_with_filters_on_the_plain_products(pair):
    x, y = pair(40)
    t = pair(40, 8, seed=9)[0].detach()
    c = x @ y.T
    out = c > c.diagonal()[:, None] + 0.05
    r = t @ t.T
    mu = (0.2 * (1 - r) / 0.7).clamp(max=0.2).fill_diagonal_(0.0)
    s = (10.0 * (c + mu)).masked_fill(out, -torch.inf)
    got = margin_clip_loss(
        x, y, 10.0, text_embeddings=t, threshold=0.3, filters=filters.absolute(0.05), directions="image"
    )
    torch.testing.assert_close(got, F.cross_entropy(s, torch.arange(40)), rtol=1e-5, atol=1e-5)


def test_errors(pair):
    x, y = pair(6)
    for change, message in (
        ({"text_embeddings": torch.ones(5, 3)}, "text_embeddings: got 5 rows, wanted 6"),
        ({"text_embeddings": x, "margin": -1}, "margin: got -1"),
        ({"text_embeddings": x, "filters": filters.guide(x, y)}, "text_embeddings: got a margin beside a guide"),
    ):
        with pytest.raises(ValueError, match=message):
            margin_clip_loss(x, y, 1.0, **change)


def test_under_autocast_the_threshold_stays_exact(pair):
    x, y = pair(20)
    with torch.autocast("cpu", torch.bfloat16):
        got = margin_clip_loss(x, y, 10.0, text_embeddings=y)
    half = [t.bfloat16() for t in (x, y)]
    want = margin_clip_loss(*half, 10.0, text_embeddings=y.bfloat16())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_no_text_at_all(pair):
    x, y = pair(3)
    loss = margin_clip_loss(x, y[:0], 10.0, text_embeddings=y[:0], labels=torch.full((3,), -1))
    assert loss.item() == 0.0


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("m", [7, 40])
def test_an_image_stands_at_all_its_captions(pair, count, m):
    x, y = pair(m)
    t, others = (pair(k, 8, seed=9)[0].detach() for k in (m, m * count))
    captions = others.reshape(m, count, 8)
    r = torch.einsum("mce,ne->mnc", captions, t).amax(2)
    mu = (0.2 * (1 - r) / 0.7).clamp(max=0.2).fill_diagonal_(0.0)
    s, label = 10.0 * (x @ y.T + mu), torch.arange(m)
    want = (F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2
    got = margin_clip_loss(x, y, 10.0, text_embeddings=t, caption_embeddings=captions, threshold=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_its_own_text_as_the_only_caption_changes_nothing(pair):
    x, y = pair(20)
    t = pair(20, 8, seed=9)[0].detach()
    plain = margin_clip_loss(x, y, 10.0, text_embeddings=t)
    for captions in (t[:, None], t[:, None].expand(-1, 3, -1)):
        assert torch.equal(margin_clip_loss(x, y, 10.0, text_embeddings=t, caption_embeddings=captions), plain)


def test_errors_of_captions(pair):
    x, y = pair(6)
    t = pair(6, 8, seed=9)[0].detach()
    for message, captions in (
        (r"caption_embeddings: got 5 images, wanted 6 as in image_features", t[:5, None]),
        (r"caption_embeddings: got .* wanted shape \[M, C, E\] with C and E >= 1", t),
        (r"caption_embeddings: got .* wanted shape \[M, C, E\] with C and E >= 1", t[:, None][:, :0]),
        (r"caption_embeddings: got .* wanted D = 8 as in text_embeddings", t[:, None, :7]),
    ):
        with pytest.raises(ValueError, match=message):
            margin_clip_loss(x, y, 10.0, text_embeddings=t, caption_embeddings=captions)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_caption_that_is_not_a_number_is_not_hidden(pair, layer):
    x, y = pair(6)
    t, others = (pair(k, 8, seed=9)[0].detach() for k in (6, 18))
    captions = others.reshape(6, 3, 8)
    captions[2, layer] = float("nan")
    assert margin_clip_loss(x, y, 7.0, text_embeddings=t, caption_embeddings=captions, threshold=0.3).isnan()
