"""multiscale_itm and its loss: the formulas, what relevance does, pairs by index, padding, errors."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from multiscale_cases import IMAGE, TEXT, assert_same, by_mode, formula, gradients, inputs

from fastvlm_loss import (
    ITMBatch,
    MultiscaleITMLoss,
    hard_negatives,
    itm_batch,
    itm_loss,
    multiscale_itm,
    multiscale_itm_loss,
)
from fastvlm_loss.backends import pair_products as chunked

WEIGHTS = torch.linspace(-1, 2, 8, dtype=torch.float64)


@pytest.fixture(params=[2**20, 30], ids=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, "cpu", request.param)


@by_mode
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", ["both", "image", "text", "none"])
def test_equals_the_formula_on_gathered_patches(mode, masked, given, chunks):
    x, y, r, mask = inputs(n=5 if given == "none" else 8 if given == "image" else 7)
    image = IMAGE if given in ("both", "image") else None
    text = TEXT if given == "both" else TEXT[:5] if given == "text" else None
    i, j = (torch.arange(len(t)) if k is None else k for t, k in ((x, image), (y, text)))
    w = WEIGHTS[: len(i)]
    want = formula(torch.einsum("kpd,kd->kp", x[i], y[j]), r[i], mode, mask[i] if masked else None)
    got = multiscale_itm(x, y, r, image_index=image, text_index=text, mode=mode, patch_mask=mask if masked else None)
    assert_same(gradients(w * got.scores, (x, y, r)), gradients(w * want, (x, y, r)))
    assert torch.equal(got.valid, mask[i].any(1) | (not masked))


@by_mode
def test_the_counterexample_of_the_literal_form(mode):
    # three patches with these products: unit vectors in four dimensions
    c, r = torch.tensor([-0.2, -0.05, -0.6]).double(), torch.tensor([[1.0, 1.0, 0.0]]).double()
    x = torch.cat([c[:, None], torch.diag((1 - c.square()).sqrt())], 1)[None].requires_grad_()
    y = torch.tensor([[1.0, 0, 0, 0]]).double()
    score, dx = gradients(multiscale_itm(x, y, r, mode=mode).scores, (x,))
    share = dx[0, :, 0]
    if mode == "mul":
        assert share.tolist() == [0, 0, 0] and score.item() == 0.0  # patch 3, at 0 times its product
    else:
        assert share.argmax() == 1 and share[2] < 0.01 and -0.25 < score.item() <= -0.05
    if mode == "hard":
        assert share.tolist() == [0, 1, 0]


def test_soft_lies_within_the_products_and_hard_is_its_limit():
    x, y, r, _ = inputs()
    c = torch.einsum("kpd,kd->kp", x[IMAGE], y[TEXT])
    for sharpness in (0.1, 1.0, 10.0, 300.0):
        for weight in (0.0, 1.0, 5.0):
            how = {"sharpness": sharpness, "relevance_weight": weight, "image_index": IMAGE, "text_index": TEXT}
            soft = multiscale_itm(x, y, r, **how).scores
            assert bool((soft >= c.amin(1) - 1e-12).all()) and bool((soft <= c.amax(1) + 1e-12).all())
    hard = multiscale_itm(x, y, r, mode="hard", sharpness=1e5, image_index=IMAGE, text_index=TEXT).scores
    soft = multiscale_itm(x, y, r, sharpness=1e5, image_index=IMAGE, text_index=TEXT).scores
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-4)
    torch.testing.assert_close(hard, c.amax(1), rtol=0, atol=1e-4)
    mean = multiscale_itm(x, y, sharpness=1e-6, image_index=IMAGE, text_index=TEXT).scores
    torch.testing.assert_close(mean, c.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_weight_zero_ignores_relevance_and_a_constant_cancels(mode):
    x, y, r, mask = inputs()
    how = {"image_index": IMAGE, "text_index": TEXT, "mode": mode, "patch_mask": mask}
    plain = multiscale_itm(x, y, **how).scores
    off, dr = gradients(multiscale_itm(x, y, r, relevance_weight=0.0, **how).scores, (r,))
    assert_same([off], [plain.detach()])
    assert not dr.any()
    same = multiscale_itm(x, y, torch.full_like(r, 0.3), **how).scores
    shift = 0.0 if mode == "soft" else math.log(0.3) / 10
    torch.testing.assert_close(same, torch.where(mask.any(1)[IMAGE], plain + shift, 0.0))


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_gradients_of_the_specification(weight):
    x, y, r, _ = inputs(b=1, n=1, p=5)
    s = 7.0
    c = (x[0] @ y[0]).detach()
    a, prior = (s * c + weight * r[0].log()).softmax(0), (weight * r[0].log()).softmax(0)
    soft = multiscale_itm(x, y, r, sharpness=s, relevance_weight=weight)
    _, dx, dr = gradients(soft.scores, (x, r))
    assert_same([dx[0]], [(a[:, None] * y).detach()])
    assert_same([dr[0]], [(weight / (s * r[0]) * (a - prior)).detach()])
    best = (c + weight / s * r[0].log()).argmax()
    _, dr = gradients(multiscale_itm(x, y, r, mode="hard", sharpness=s, relevance_weight=weight).scores, (r,))[:2]
    want = torch.zeros(5).double()
    want[best] = weight / (s * r[0, best].detach())
    assert_same([dr[0]], [want])


@pytest.mark.parametrize("mode", ["hard", "mul"])
def test_of_equal_patches_the_first_has_the_gradient(mode):
    x = torch.tensor([0.0, 1.0, 1.0, 1.0])[None, :, None].requires_grad_()
    _, dx = gradients(multiscale_itm(x, torch.ones(1, 1), torch.ones(1, 4), mode=mode).scores, (x,))
    assert dx.flatten().tolist() == [0, 1, 0, 0]


@by_mode
def test_gradcheck(mode, chunks):
    x, y, r, mask = inputs()
    how = {"image_index": IMAGE, "text_index": TEXT, "mode": mode, "patch_mask": mask}
    assert torch.autograd.gradcheck(lambda x, y, r: multiscale_itm(x, y, r, **how).scores, (x, y, r))
    assert torch.autograd.gradcheck(lambda x, y, r: multiscale_itm(x, y, r, mode=mode).scores, (x, y[:5], r))


def test_relevance_outside_is_clamped_with_a_warning_and_has_no_gradient():
    x, y, _, _ = inputs(b=2, n=2)
    r = torch.tensor([[-0.5, 0.02, 0.5, 1.5], [1.0, 0.05, 0.0, 0.7]], dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match=r"patch_relevance: got values outside \[0, 1\]"):
        got, dr = gradients(multiscale_itm(x, y, r).scores, (r,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same([got], [multiscale_itm(x, y, r.detach().clamp(0.05, 1)).scores.detach()])
        multiscale_itm(x, y, torch.where(r < 0, math.nan, r).masked_fill(r > 1, 0.0), patch_mask=(r >= 0) & (r <= 1))
    # at 1, where a relevance begins, and at the floor there is one
    assert (dr == 0).tolist() == [[True, True, False, True], [False, False, True, False]]


@by_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf, 50.0])
def test_what_stands_in_padding_reaches_nothing(mode, bad, chunks):
    x, y, r, mask = inputs()
    how = {"image_index": IMAGE, "text_index": TEXT, "mode": mode, "patch_mask": mask}
    want = gradients(multiscale_itm(x, y, r, **how).scores, (x, y, r))
    x, r = x.detach().masked_fill(~mask[..., None], bad), r.detach().masked_fill(~mask, bad)
    got = gradients(multiscale_itm(x.requires_grad_(), y, r.requires_grad_(), **how).scores, (x, y, r))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not got[1][~mask].any() and not got[3][~mask].any()
    alone = multiscale_itm(x, y[:5], r, mode=mode, patch_mask=mask)
    assert all(g.isfinite().all() for g in gradients(alone.scores, (x, y, r)))


@by_mode
def test_padding_is_as_if_it_were_not_there(mode):
    x, y, r, mask = inputs()
    scores, valid = multiscale_itm(x, y[:5], r, mode=mode, patch_mask=mask)
    for i in range(5):
        kept = mask[i]
        if kept.any():
            alone = multiscale_itm(x[i : i + 1, kept], y[i : i + 1], r[i : i + 1, kept], mode=mode).scores
            torch.testing.assert_close(alone[0], scores[i])
    assert valid.tolist() == [True, False, True, True, True] and scores[1].item() == 0.0


@by_mode
def test_no_patches_no_pairs_no_images(mode):
    x, y, r, _ = inputs()
    scores, valid = multiscale_itm(x[:, :0], y, r[:, :0], image_index=IMAGE, text_index=TEXT, mode=mode)
    assert not valid.any() and not scores.any()
    assert not torch.autograd.grad(scores.sum(), y)[0].any()
    none = torch.zeros(0, dtype=torch.int64)
    for tensors in ((x, y, r), (x[:0], y, r[:0]), (x[:0], y[:0], r[:0])):
        scores, valid = multiscale_itm(*tensors, image_index=none, text_index=none, mode=mode)
        assert scores.shape == valid.shape == (0,)
        found = torch.autograd.grad(scores.sum(), (x, y, r))
        assert not any(g.any() for g in found)
    pairs = ITMBatch(none, none, none, torch.zeros(0))
    assert multiscale_itm_loss(x, y, pairs, mode=mode).item() == 0.0


def test_autocast_changes_nothing_and_joins_two_dtypes():
    x, y, r, _ = inputs(n=5, dtype=torch.float32)
    want = multiscale_itm(x, y, r).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multiscale_itm(x, y, r).scores, want)
        mixed = multiscale_itm(x, y.bfloat16(), r).scores
    torch.testing.assert_close(mixed, multiscale_itm(x, y.bfloat16().float(), r).scores)


def test_the_loss_is_that_of_the_match_logits():
    x, y, r, mask = inputs(b=6, n=6)
    negatives = hard_negatives(x[:, 0].detach(), y.detach(), 2, seed=1, step=0)
    pairs = itm_batch(negatives, mode="weight")
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, -5.0))
    tensors = x, y, r, scale, bias
    got = multiscale_itm_loss(x, y, pairs, scale, bias, patch_relevance=r, patch_mask=mask)
    scores, valid = multiscale_itm(x, y, r, image_index=pairs.image_index, text_index=pairs.text_index, patch_mask=mask)
    w = pairs.weights * valid
    each = F.binary_cross_entropy_with_logits(scale * scores + bias, pairs.labels.double(), reduction="none")
    assert_same(gradients(got, tensors), gradients((w * each).sum() / w.sum(), tensors), rtol=1e-7, atol=1e-9)
    logits = torch.stack([torch.zeros_like(scores), 10 * scores - 5], 1)
    default = multiscale_itm_loss(x, y, pairs, patch_relevance=r, patch_mask=mask)
    torch.testing.assert_close(default, itm_loss(logits, pairs.labels, w))
    for reduction in ("sum", "none"):
        found = MultiscaleITMLoss(reduction=reduction)(x, y, pairs, patch_relevance=r, patch_mask=mask)
        torch.testing.assert_close(found, itm_loss(logits, pairs.labels, w, reduction=reduction))
    assert not ((x.detach().isnan()).any()) and not valid.all()


def test_it_learns_which_patch_a_text_is_about():
    """The text of each image is one of its patches, at random; a relevance that names it makes the loss smaller."""
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(32, 6, 16, generator=g), dim=2)
    which = torch.randint(0, 6, (32,), generator=g)
    y = F.normalize(x[torch.arange(32), which] + 0.1 * torch.randn(32, 16, generator=g), dim=1)
    pairs = itm_batch(hard_negatives(x.mean(1), y, hardness=torch.inf), mode="weight")
    logits = torch.zeros(32, 6, requires_grad=True)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -5.0))
    optimizer = torch.optim.Adam([logits, scale, bias], lr=0.1)
    losses = []
    for _ in range(60):
        loss = multiscale_itm_loss(x, y, pairs, scale, bias, patch_relevance=logits.sigmoid())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert float((logits.argmax(1) == which).double().mean()) > 0.7


X, Y = torch.zeros(4, 3, 5), torch.zeros(4, 5)
PAIRS = ITMBatch(torch.arange(4), torch.arange(4), torch.ones(4).long(), torch.ones(4))
ERRORS = [
    (TypeError, "patch_features: got list, wanted a floating", lambda: multiscale_itm([1.0], Y)),
    (ValueError, r"patch_features: got shape \[4, 5\], wanted \[B, P, D\]", lambda: multiscale_itm(Y, Y)),
    (ValueError, r"patch_features: got shape \[4, 3, 0\], .* D >= 1", lambda: multiscale_itm(X[..., :0], Y)),
    (ValueError, r"text_features: got .*\[4, 3, 5\]", lambda: multiscale_itm(X, X)),
    (ValueError, r"text_features: got .*\[4, 4\], wanted D = 5", lambda: multiscale_itm(X, Y[:, :4])),
    (TypeError, "text_features: got a float64", lambda: multiscale_itm(X, Y.double())),
    (ValueError, "text_features: got a tensor on meta", lambda: multiscale_itm(X, Y.to("meta"))),
    (ValueError, "text_index: got 3 texts for 4 images, wanted as many", lambda: multiscale_itm(X, Y[:3])),
    (TypeError, "image_index: got a float32", lambda: multiscale_itm(X, Y, image_index=Y[0])),
    (ValueError, "image_index: got 4 at index 3", lambda: multiscale_itm(X, Y, image_index=1 + torch.arange(4))),
    (ValueError, "text_index: got -1 at index 0", lambda: multiscale_itm(X, Y, text_index=torch.arange(4) - 1)),
    (ValueError, r"patch_relevance: got .*\[4, 5\], wanted shape \[4, 3\]", lambda: multiscale_itm(X, Y, Y)),
    (TypeError, "patch_relevance: got a int64", lambda: multiscale_itm(X, Y, X[..., 0].long())),
    (TypeError, "patch_mask: got a float32", lambda: multiscale_itm(X, Y, patch_mask=X[..., 0])),
    (ValueError, r"patch_mask: got .*\[4\], wanted shape", lambda: multiscale_itm(X, Y, patch_mask=Y[:, 0] > 0)),
    (ValueError, "mode: got 'max', wanted one of", lambda: multiscale_itm(X, Y, mode="max")),
    (ValueError, "sharpness: got 0.0, wanted a finite number > 0", lambda: multiscale_itm(X, Y, sharpness=0.0)),
    (ValueError, "relevance_weight: got -1", lambda: multiscale_itm(X, Y, relevance_weight=-1)),
    (ValueError, "floor: got 0, wanted a finite number > 0 and <= 1", lambda: multiscale_itm(X, Y, floor=0)),
    (ValueError, "patch_features: got NaN .* row 0", lambda: multiscale_itm(X / 0, Y, check_finite=True)),
    (ValueError, "text_features: got NaN .* row 0", lambda: multiscale_itm(X, Y / 0, check_finite=True)),
    (ValueError, "patch_relevance: got NaN", lambda: multiscale_itm(X, Y, X[..., 0] / 0, check_finite=True)),
    (TypeError, "pairs: got tuple, wanted an ITMBatch", lambda: multiscale_itm_loss(X, Y, tuple(PAIRS))),
    (ValueError, "labels: got 2 at index 2", lambda: multiscale_itm_loss(X, Y, PAIRS._replace(labels=PAIRS[0]))),
    (ValueError, r"weights: got .*\[3\]", lambda: multiscale_itm_loss(X, Y, PAIRS._replace(weights=torch.ones(3)))),
    (ValueError, r"logit_scale: got .*\[2\]", lambda: multiscale_itm_loss(X, Y, PAIRS, torch.ones(2))),
    (TypeError, "logit_bias: got str", lambda: multiscale_itm_loss(X, Y, PAIRS, 1.0, "-5")),
    (ValueError, "reduction: got 'avg'", lambda: multiscale_itm_loss(X, Y, PAIRS, reduction="avg")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[c[1][:40] for c in ERRORS])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
