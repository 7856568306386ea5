"""graded_clip_loss: what it is equal to, its precision where the task is easy, what it drops and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss, graded_clip_loss
from fastvlm_loss.losses import registry
from fastvlm_loss.testing import Case, evaluate, inputs, violations

SPEC = registry["graded_clip_loss"]
GRADED = {"relevant": torch.tensor([[0, 2], [1, -1], [2, 3], [-1, -1]]), "relevance": torch.rand(4, 2) + 0.1}


def both(loss, other, *tensors):
    results = [(value, *torch.autograd.grad(value, tensors)) for value in (loss, other)]
    return zip(*results, strict=True)


def test_one_grade_is_a_label(pair, live_backend):
    x, y = pair(40, n=30)
    labels = torch.arange(40) % 23 - 1
    one = {"relevant": torch.stack([labels, labels * 0 + 7], 1), "relevance": torch.tensor([[3.0, 0.0]]).expand(40, 2)}
    with fastvlm_loss.backend(live_backend):
        for a, b in both(graded_clip_loss(x, y, 20.0, **one), clip_loss(x, y, 20.0, labels=labels), x, y):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_equal_grades_are_equal_ids(pair, live_backend):
    x, y = pair(20)
    with fastvlm_loss.backend(live_backend):
        graded = graded_clip_loss(
            x, y, 20.0, relevant=torch.arange(20)[:, None] // 2 * 2 + torch.tensor([0, 1]), relevance=torch.ones(20, 2)
        )
        for a, b in both(graded, clip_loss(x, y, 20.0, image_ids=torch.arange(20) // 2, positives="out"), x, y):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "torch", "auto"])
@pytest.mark.parametrize(("m", "n"), [(1, 5), (5, 1), (40, 129), (129, 40)])
def test_batches_that_are_not_square(m, n, backend):
    for k, options in enumerate(SPEC.variants):
        if options.get("reduction") != "none" and not callable(options.get("text_weights")):
            assert not violations(SPEC, Case(m, 24, n, options=options, backend=backend, seed=k))


def test_well_aligned_pairs_at_a_large_scale_keep_their_digits(live_backend):
    case = Case(m=200, d=64, scale=100.0, noise=0.05, options=SPEC.variants[0])
    tensors, options = inputs(SPEC, case)
    # one grade far above the others, where the softmax is too: 1 - Q in fp32 would have one digit
    options["relevance"] = torch.where(torch.arange(3) == 0, 1.0, 1e-6) * torch.ones(200, 3)
    options["relevant"][:, 0] = torch.arange(200)
    with fastvlm_loss.backend(live_backend):
        got = evaluate(graded_clip_loss, tensors, options)
    wide = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    want = evaluate(SPEC.oracle, wide, {**options, "relevance": options["relevance"].double()})
    for name in ("loss", "image_features", "text_features"):
        worst = want[name].abs().max()
        assert (got[name] - want[name]).abs().max() < 8 * torch.finfo(torch.float32).eps * worst, name


def test_no_grade_no_loss_but_a_candidate(pair):
    x, y = pair(4)
    losses = graded_clip_loss(x, y, 5.0, **GRADED, directions="image", reduction="none")
    assert losses[3] == 0 and (losses[:3] > 0).all()
    s = 5.0 * x @ y.T
    share = GRADED["relevance"][0] / GRADED["relevance"][0].sum()
    torch.testing.assert_close(losses[0], s[0].logsumexp(0) - share[0] * s[0, 0] - share[1] * s[0, 2])
    bad = GRADED["relevance"].clone()
    bad[0, 1], bad[2, 0] = -1.0, math.nan
    good = {**GRADED, "relevance": bad.clamp(min=0).nan_to_num(0.0)}
    assert graded_clip_loss(x, y, 5.0, **{**GRADED, "relevance": bad}) == graded_clip_loss(x, y, 5.0, **good)
    torch.testing.assert_close(
        graded_clip_loss(x, y, 5.0, **{**GRADED, "relevance": 7 * bad}), graded_clip_loss(x, y, 5.0, **good)
    )


def test_empty_batches():
    x = torch.ones(3, 4, requires_grad=True)
    for m, n in ((0, 0), (0, 3), (3, 0)):
        given = {"relevant": torch.full((m, 2), -1), "relevance": torch.ones(m, 2)}
        loss = graded_clip_loss(x[:m], x[:n], 5.0, **given)
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_the_least_is_the_entropy_of_the_grades():
    x, index = torch.eye(6), torch.arange(6)[:, None].repeat(1, 2)
    index[:, 1] = (index[:, 1] + 1) % 6
    loss = graded_clip_loss(
        F.normalize(x + x.roll(1, 1), dim=1), x, 100.0, relevant=index, relevance=torch.ones(6, 2), directions="image"
    )
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


X, COL = torch.eye(4), torch.tensor([0, 2])
ERRORS = [
    ("relevant: got shape .4., wanted an integer tensor of shape .4, K. with K >= 1", {"relevant": torch.arange(4)}),
    ("relevant: got list, wanted an integer tensor", {"relevant": [[0], [1], [2], [3]]}),
    (r"relevant: got shape \[4, 0\]", {"relevant": torch.zeros(4, 0).long(), "relevance": torch.zeros(4, 0)}),
    (r"relevant: got 4 at index 1, wanted values in \[-1, 4\)", {"relevant": GRADED["relevant"] + COL}),
    (r"relevance: got a float32 tensor of shape \[4, 3\], wanted shape", {"relevance": torch.ones(4, 3)}),
    ("relevance: got -1, wanted values >= 0", {"relevance": -torch.ones(4, 2), "check_finite": True}),
    ("relevance: got NaN or infinity in row 0", {"relevance": torch.ones(4, 2) / 0, "check_finite": True}),
    ("strict: got 1 of 4 images without a positive, the first at index 3", {"strict": True}),
    ("strict: got 1 of 4 texts without a positive, the first at index 0", {
        "strict": True, "directions": "text", "relevant": GRADED["relevant"].clamp(min=1)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), ERRORS, ids=[e[0][:30] for e in ERRORS])
def test_errors_name_the_argument(message, change):
    with pytest.raises(ValueError, match=message):
        graded_clip_loss(X, X, 5.0, **{**GRADED, **change})
