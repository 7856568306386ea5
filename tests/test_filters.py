"""False-negative filters: what each rule takes out, in which direction, and what it never touches."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import BatchMetrics, clip_loss, filters, hard_negative_clip_loss, triplet_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


GUIDE = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(5)), dim=1)
GUIDE_TEXT = F.normalize(GUIDE + 0.3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(6)), dim=1)

RULES = {
    "absolute": (filters.absolute(0.02), lambda c, own: c > own + 0.02),
    "above_margin": (filters.above_margin(0.1), lambda c, own: c >= own - 0.1),
    "relative": (filters.relative(0.8), lambda c, own: (c >= 0.8 * own) & (own > 0)),
}


def masked(s, out):
    """Cross-entropy of the rows without what is `out`, but for the targets."""
    eye = torch.eye(len(s), dtype=torch.bool)
    return F.cross_entropy(s.masked_fill(out & ~eye, -torch.inf), torch.arange(len(s)))


@pytest.mark.parametrize("rule", RULES)
def test_each_direction_compares_with_its_own_positive(pair, rule):
    x, y = pair(40, noise=3.0)
    made, out = RULES[rule]
    c = x @ y.T
    own = c.diagonal()
    by_rows, by_columns = out(c, own[:, None]), out(c.T, own[:, None])
    assert 0 < (by_rows & ~torch.eye(40, dtype=torch.bool)).sum() < 1000 and not torch.equal(by_rows, by_columns.T)
    want = (masked(10.0 * c, by_rows) + masked(10.0 * c.T, by_columns)) / 2
    got = clip_loss(x, y, 10.0, filters=made)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_guide_looks_at_its_own_features(pair):
    x, y = pair(40)
    t = GUIDE @ GUIDE_TEXT.T
    want = masked(10.0 * x @ y.T, t > t.diagonal()[:, None] - 0.05)
    got = clip_loss(x, y, 10.0, filters=filters.guide(GUIDE, GUIDE_TEXT, 0.05), directions="image")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_similar_texts_leave_whatever_their_positive_is(pair):
    x, y = pair(40)
    want = masked(10.0 * x @ y.T, GUIDE_TEXT @ GUIDE_TEXT.T > 0.5)
    got = clip_loss(x, y, 10.0, filters=filters.similar(GUIDE_TEXT, GUIDE_TEXT, 0.5), directions="image")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_several_compose(pair):
    x, y = pair(40, noise=3.0)
    c, t = x @ y.T, GUIDE @ GUIDE_TEXT.T
    out = (c > c.diagonal()[:, None] + 0.02) | (c >= 0.9 * c.diagonal()[:, None]) & (c.diagonal() > 0)[:, None]
    out = out | (t > t.diagonal()[:, None])
    rules = [filters.absolute(0.02), filters.relative(0.9), filters.guide(GUIDE, GUIDE_TEXT)]
    got = clip_loss(x, y, 10.0, filters=rules, directions="image")
    torch.testing.assert_close(got, masked(10.0 * c, out), rtol=1e-5, atol=1e-5)


def test_a_limit_out_of_reach_changes_nothing(pair):
    x, y = pair(40)
    for rule in (filters.absolute(1e9), filters.above_margin(-1e9), filters.relative(1e9)):
        assert torch.equal(clip_loss(x, y, 10.0, filters=rule), clip_loss(x, y, 10.0, filters=filters.absolute(1e8)))
        torch.testing.assert_close(clip_loss(x, y, 10.0, filters=rule), clip_loss(x, y, 10.0), rtol=1e-6, atol=1e-6)


def test_a_positive_is_never_dropped(pair):
    x, y = pair(40)
    rule = filters.absolute(-1e9)  # everything else is
    loss = clip_loss(x, y, 10.0, filters=rule)
    assert loss.abs() < 1e-6
    ids = torch.arange(40) // 2
    both = clip_loss(x, y, 10.0, filters=rule, image_ids=ids, positives="out", directions="image", reduction="none")
    s = (10.0 * x @ y.T)[torch.arange(40)[:, None], (torch.arange(40) // 2 * 2)[:, None] + torch.arange(2)]
    torch.testing.assert_close(both, s.logsumexp(1) - s.mean(1), rtol=1e-4, atol=1e-5)


def test_works_for_labels(pair):
    x, y = pair(9, n=5, noise=3.0)
    labels = torch.tensor([0, 4, 4, -1, 2, 1, 0, 3, 2])
    c = x @ y.T
    own = c[torch.arange(9), labels.clamp(min=0)]
    hit = labels[:, None] == torch.arange(5)
    s = (10.0 * c).masked_fill((c > own[:, None] + 0.02) & ~hit, -torch.inf)
    want = F.cross_entropy(s[labels >= 0], labels[labels >= 0])
    got = clip_loss(x, y, 10.0, labels=labels, filters=filters.absolute(0.02), directions="image")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_works_in_the_other_losses(pair):
    x, y = pair(40, noise=3.0)
    c = x @ y.T
    negative = ~(c > c.diagonal()[:, None] + 0.02) & ~torch.eye(40, dtype=torch.bool)
    h = (0.2 + c - c.diagonal()[:, None]).clamp(min=0) * negative
    got = triplet_loss(x, y, filters=filters.absolute(0.02), directions="image", reduction="none")
    torch.testing.assert_close(got, h.sum(1), rtol=1e-5, atol=1e-5)
    s = 10.0 * c
    w = torch.where(negative, 0.5 * s, -torch.inf).softmax(1) * negative.sum(1, keepdim=True)
    want = torch.log1p((w * (s - s.diagonal()[:, None]).exp()).sum(1))
    got = hard_negative_clip_loss(
        x, y, 10.0, beta=0.5, filters=filters.absolute(0.02), directions="image", reduction="none"
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_share_that_is_taken_out_is_told_and_warned_of(pair):
    x, y = pair(40, noise=3.0)
    c = x @ y.T
    metrics = BatchMetrics()
    with pytest.warns(UserWarning, match=r"filters: with the ids they took out \d+% of the negatives"):
        clip_loss(x, y, 10.0, filters=filters.above_margin(0.2), metrics=metrics)
    off = ~torch.eye(40, dtype=torch.bool)
    rows, cols = ((z >= c.diagonal()[:, None] - 0.2) & off for z in (c, c.T))
    assert metrics.filtered.item() == pytest.approx((rows.sum() + cols.sum()).item() / (2 * 40 * 39), abs=1e-6)


def test_errors(pair):
    x, y = pair(40)
    with pytest.raises(TypeError, match=r"filters: got str 'absolute', wanted fastvlm_loss.filters.absolute"):
        clip_loss(x, y, 1.0, filters=["absolute"])
    with pytest.raises(ValueError, match="got a guide beside a guide, wanted one second score matrix"):
        clip_loss(x, y, 1.0, filters=[filters.guide(x, y), filters.guide(x, y)])
    with pytest.raises(ValueError, match=r"filters' text_features: got .*\[7, 8\].*wanted 40 rows"):
        clip_loss(x, y, 1.0, filters=filters.guide(GUIDE, GUIDE[:7]))
    with pytest.raises(ValueError, match="share: got -1"):
        filters.relative(-1)


def test_a_rule_checks_its_features():
    with pytest.raises(TypeError, match="image_features: got NoneType None"):
        filters.guide(None, None)
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match="filters: got int 3, wanted"):
        clip_loss(x, x, 1.0, filters=3)
    with pytest.raises(ValueError, match="filters' text_features: got NaN"):
        clip_loss(x, x, 1.0, filters=filters.guide(x, x * torch.nan), check_finite=True)
