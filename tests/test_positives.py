"""Several positives in clip_loss, by ids: published forms, and what the three meanings have in common."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


IDS = torch.arange(40) // 3


def test_out_is_supcon_out(pair):
    # Khosla et al. equation 2: mean over the positives outside the logarithm
    x, y = pair(40)
    s = 10.0 * x @ y.T
    log_p, same = F.log_softmax(s, 1), IDS[:, None] == IDS
    want = -(log_p * same).sum(1) / same.sum(1)
    got = clip_loss(x, y, 10.0, image_ids=IDS, positives="out", directions="image", reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_in_is_mil_nce(pair):
    # Miech et al. equation 1: the probability of all positives together
    x, y = pair(40)
    same = IDS[:, None] == IDS
    want = -(F.softmax(10.0 * y @ x.T, 1) * same).sum(1).log()
    got = clip_loss(x, y, 10.0, image_ids=IDS, positives="in", directions="text", reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_in_is_never_above_out(pair):
    x, y = pair(40)
    out, inside = (clip_loss(x, y, 10.0, image_ids=IDS, positives=p, reduction="none") for p in ("out", "in"))
    assert (inside <= out + 1e-6).all() and (inside < out - 0.01).any()


def test_without_duplicates_the_three_are_one(pair):
    x, y = pair(40)
    ids = torch.randperm(40)
    plain = clip_loss(x, y, 10.0)
    for positives in ("mask", "out", "in"):
        torch.testing.assert_close(
            clip_loss(x, y, 10.0, image_ids=ids, positives=positives), plain, rtol=1e-6, atol=1e-6
        )
        assert torch.equal(clip_loss(x, y, 10.0, positives=positives), plain)


def test_a_text_without_any_image_is_dropped(pair):
    x, y = pair(6, n=8)
    labels, image_ids = torch.arange(6), torch.arange(6)
    for positives in ("out", "in"):
        both = {"image_ids": image_ids, "text_ids": torch.arange(8), "labels": labels, "positives": positives}
        got = clip_loss(x, y, 5.0, directions="text", reduction="none", **both)
        assert not got[6:].any() and (got[:6] > 0).all()


def test_every_entry_a_positive_of_its_row(pair):
    # in: certain; out: the cross-entropy against the uniform distribution
    x, y = pair(10)
    same = torch.zeros(10).long()
    assert clip_loss(x, y, 10.0, image_ids=same, positives="in").abs() < 1e-6
    s = 10.0 * x @ y.T
    want = (s.logsumexp(1) - s.mean(1)).mean() / 2 + (s.logsumexp(0) - s.mean(0)).mean() / 2
    torch.testing.assert_close(clip_loss(x, y, 10.0, image_ids=same, positives="out"), want, rtol=1e-5, atol=1e-5)


def test_smoothing_inside_is_refused(pair):
    x, y = pair(4)
    with pytest.raises(ValueError, match="label_smoothing: got a number above 0 beside positives='in'"):
        clip_loss(x, y, 1.0, positives="in", label_smoothing=0.1)


def test_several_images_of_a_text_are_inside_without_ids(pair):
    x, y = pair(12, n=4)
    labels = torch.tensor([0, 1, 2, 3] * 3)
    z, hit = 10.0 * y @ x.T, torch.arange(4)[:, None] == labels
    want = z.logsumexp(1) - z.masked_fill(~hit, -torch.inf).logsumexp(1)
    got = clip_loss(x, y, 10.0, labels=labels, positives="in", directions="text", reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
