"""BatchMetrics: what a pass tells besides its loss equals the dense score matrix, and changes nothing."""

import pytest
import torch

import fastvlm_loss
from fastvlm_loss import (
    BatchMetrics,
    clip_loss,
    hard_negative_clip_loss,
    margin_clip_loss,
    relevance_clip_loss,
    soft_target_clip_loss,
    triplet_loss,
)


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_the_dense_score_matrix(pair, dtype):
    x, y = pair(70, 32, dtype=dtype, noise=4.0)
    metrics = BatchMetrics()
    clip_loss(x, y, 10.0, -1.0, metrics=metrics)
    s = 10.0 * x.float() @ y.float().T - 1.0
    off = s.detach().masked_fill(torch.eye(70, dtype=torch.bool), -torch.inf)
    assert metrics.image_accuracy.item() == pytest.approx((s.argmax(1) == torch.arange(70)).float().mean().item())
    assert metrics.text_accuracy.item() == pytest.approx((s.argmax(0) == torch.arange(70)).float().mean().item())
    assert 0 < metrics.image_accuracy < 1
    assert metrics.positive_score.item() == pytest.approx(s.diagonal().mean().item(), rel=1e-5)
    assert metrics.image_lse.item() == pytest.approx(s.logsumexp(1).mean().item(), rel=1e-5)
    assert metrics.text_lse.item() == pytest.approx(s.logsumexp(0).mean().item(), rel=1e-5)
    assert torch.equal(metrics.hardest_text, off.argmax(1)) and torch.equal(metrics.hardest_image, off.argmax(0))
    assert metrics.filtered.item() == 0.0


def test_asking_changes_neither_value_nor_gradient(pair):
    x, y = pair(70)
    plain, asked = clip_loss(x, y, 10.0), clip_loss(x, y, 10.0, metrics=BatchMetrics())
    torch.testing.assert_close(asked, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(asked, (x, y)), torch.autograd.grad(plain, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_duplicates_and_missing_samples_do_not_count(pair):
    x, y = pair(20)
    ids = torch.arange(20) // 2
    ids[18:] = -1
    metrics = BatchMetrics()
    clip_loss(x, y, 10.0, image_ids=ids, metrics=metrics)
    s = (10.0 * x @ y.T).detach()
    out = (ids[:, None] == ids) | (ids == -1)[:, None] | (ids == -1)
    best = s.masked_fill(out, -torch.inf)
    want = best.argmax(1).masked_fill(ids == -1, -1)
    assert torch.equal(metrics.hardest_text, want)
    right = s.diagonal()[:18] > best.amax(1)[:18]
    assert metrics.image_accuracy.item() == pytest.approx(right.float().mean().item())
    assert metrics.positive_score.item() == pytest.approx(s.diagonal()[:18].mean().item(), rel=1e-5)
    assert metrics.filtered.item() == pytest.approx((out.sum().item() - 18) / (400 - 18), rel=1e-5)


def test_any_positive_on_top_is_right(pair):
    x, y = pair(20, noise=4.0)
    ids = torch.arange(20) // 4
    for positives in ("out", "in"):
        metrics = BatchMetrics()
        clip_loss(x, y, 10.0, image_ids=ids, positives=positives, metrics=metrics)
        top = (x @ y.T).argmax(1)
        assert metrics.image_accuracy.item() == pytest.approx((ids[top] == ids).float().mean().item())


def test_one_direction_tells_one(pair):
    x, y = pair(20)
    metrics = BatchMetrics()
    clip_loss(x, y, 10.0, directions="text", metrics=metrics)
    assert metrics.image_accuracy is None and metrics.hardest_text is None and metrics.text_accuracy is not None
    assert "text_accuracy=" in repr(metrics) and "hardest" not in repr(metrics)


def test_ties_go_to_the_lowest_index():
    x = torch.eye(4, 8)
    y = torch.eye(4, 8)
    y[3] = y[1]
    metrics = BatchMetrics()
    clip_loss(x, y, 10.0, metrics=metrics)
    assert metrics.hardest_text.tolist() == [1, 3, 0, 0] and metrics.image_accuracy.item() == 0.5


def test_every_loss_fills_them(pair):
    x, y = pair(20)
    calls = {
        "hard": lambda m: hard_negative_clip_loss(x, y, 10.0, metrics=m),
        "margin": lambda m: margin_clip_loss(x, y, 10.0, text_embeddings=y, margin=0.0, metrics=m),
        "relevance": lambda m: relevance_clip_loss(x, y, 10.0, image_relevance=torch.ones(20), metrics=m),
        "soft": lambda m: soft_target_clip_loss(
            x, y, 10.0, teacher_image_features=x, teacher_text_features=y, metrics=m
        ),
        "triplet": lambda m: triplet_loss(x, y, metrics=m),
    }
    want = BatchMetrics()
    clip_loss(x, y, 10.0, metrics=want)
    for name, call in calls.items():
        got = BatchMetrics()
        call(got)
        assert torch.equal(got.hardest_text, want.hardest_text), name
        assert got.image_accuracy == want.image_accuracy, name
        assert (got.image_lse is None) == (name in ("hard", "triplet")), name


def test_it_must_be_one(pair):
    x, y = pair(4)
    with pytest.raises(TypeError, match=r"metrics: got bool, wanted a fastvlm_loss.BatchMetrics"):
        clip_loss(x, y, 1.0, metrics=True)
