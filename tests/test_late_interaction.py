"""late_interaction_loss: what it must equal, masks, relevance, errors, and its peers."""

import pytest
import torch
import torch.nn.functional as F
from late_interaction_cases import assert_same, gradients, leaves, sets, some

import fastvlm_loss
from fastvlm_loss import BatchMetrics, LateInteractionLoss, clip_loss, late_interaction_loss
from fastvlm_loss.backends import cpp

OPTIONS = [
    {},
    {"image_ids": torch.tensor([0, 1, 0, 2, -1, 3, 3])},
    {"image_ids": torch.tensor([0, 1, 0, 2, -1, 3, 3]), "positives": "out", "label_smoothing": 0.1},
    {"image_ids": torch.tensor([0, 1, 0, 2, -1, 3, 3]), "positives": "in"},
    {"image_weights": torch.rand(7).double(), "directions": "image", "reduction": "sum"},
    {"text_weights": torch.rand(7).double(), "directions": "text", "label_smoothing": 0.2},
    {"labels": torch.tensor([3, -1, 0, 6, 6, 1, 2]), "reduction": "none"},
    {"normalize": True},
]


@pytest.mark.parametrize("interaction", ["filip", "colbert"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_one_token_each_is_clip_loss(options, interaction):
    x, y, scale = leaves(m=7, p=1, t=1)
    got = late_interaction_loss(x, y, scale, 0.5, interaction=interaction, **options)
    want = clip_loss(x[:, 0], y[:, 0], scale, 0.5, **options)
    assert_same(gradients(got, (x, y, scale)), gradients(want, (x, y, scale)))


def test_the_directions_have_scores_of_their_own():
    x, y, scale = sets()
    s = torch.einsum("ipd,jtd->ijpt", x, y)
    a, b = s.amax(3).mean(2), s.amax(2).mean(2)
    label = torch.arange(6)
    image, text = F.cross_entropy(scale * a, label), F.cross_entropy(scale * b.T, label)
    assert (a - b).abs().max() > 0.01
    torch.testing.assert_close(late_interaction_loss(x, y, scale), (image + text) / 2)
    torch.testing.assert_close(late_interaction_loss(x, y, scale, directions="image"), image)
    torch.testing.assert_close(late_interaction_loss(x, y, scale, directions="text"), text)


def test_images_and_texts_may_change_places():
    x, y, scale = leaves()
    masks = some(6, 4, 1), some(6, 3, 2)
    got = late_interaction_loss(x, y, scale, image_mask=masks[0], text_mask=masks[1])
    want = late_interaction_loss(y, x, scale, image_mask=masks[1], text_mask=masks[0])
    assert_same(gradients(got, (x, y, scale)), gradients(want, (x, y, scale)))


def test_a_sum_over_tokens_is_a_larger_scale():
    x, y, scale = leaves(p=4, t=4)
    got = late_interaction_loss(x, y, scale, interaction="colbert")
    assert_same(gradients(got, (x, y)), gradients(late_interaction_loss(x, y, 4 * scale), (x, y)))


def test_a_token_twice_changes_no_maximum_and_the_first_has_the_gradient():
    x, y, scale = sets()
    x, y = ((v * 64).round() / 64 for v in (x, y))  # exact products: the same from the same tokens
    twice = torch.cat([y, y[:, 1:2], y[:, 1:2]], 1)
    x, y, twice = (v.requires_grad_() for v in (x, y, twice))
    loss, dx, dy = gradients(late_interaction_loss(x, y, scale, directions="image"), (x, y))
    again, dx_again, d_twice = gradients(late_interaction_loss(x, twice, scale, directions="image"), (x, twice))
    assert_same((again, dx_again, d_twice[:, :3]), (loss, dx, dy))
    assert not d_twice[:, 3:].any() and dy[:, 1].any()


def test_padding_is_as_if_it_were_not_there():
    """Images of different lengths, scored one pair at a time without any padding."""
    x, y, scale = sets()
    masks = some(6, 4, 1), some(6, 3, 2)
    pairs = [[x[i][masks[0][i]] @ y[j][masks[1][j]].T for j in range(6)] for i in range(6)]
    a = torch.stack([torch.stack([s.amax(1).mean() for s in row]) for row in pairs])
    b = torch.stack([torch.stack([s.amax(0).mean() for s in row]) for row in pairs])
    want = (F.cross_entropy(scale * a, torch.arange(6)) + F.cross_entropy(scale * b.T, torch.arange(6))) / 2
    torch.testing.assert_close(late_interaction_loss(x, y, scale, image_mask=masks[0], text_mask=masks[1]), want)


@pytest.mark.parametrize("normalize", [False, True])
def test_what_stands_in_padding_reaches_nothing(normalize):
    x, y, scale = sets()
    how = {"image_mask": some(6, 4, 1), "text_mask": some(6, 3, 2), "normalize": normalize}
    results = []
    for value in (0.0, torch.nan, torch.inf, 100.0):
        tensors = [
            v.masked_fill(~how[name][..., None], value).requires_grad_()
            for v, name in ((x, "image_mask"), (y, "text_mask"))
        ]
        results.append(gradients(late_interaction_loss(*tensors, scale, **how), tensors))
        assert not results[-1][1][~how["image_mask"]].any() and not results[-1][2][~how["text_mask"]].any()
    assert results[0][1].any(dim=-1).sum() > 6
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(other, results[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"image_ids": torch.tensor([0, 1, 1, 2, 3, 4])}, {"label_smoothing": 0.1}])
def test_a_sample_without_any_token_takes_no_part(options):
    x, y, scale = leaves()
    empty = torch.ones(6, 3, dtype=torch.bool).index_fill(0, torch.tensor(4), False)
    kept = torch.tensor([0, 1, 2, 3, 5])
    fewer = {k: v[kept] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = gradients(late_interaction_loss(x, y, scale, text_mask=empty, **options), (x, y, scale))
    # its image stays a candidate of the other texts
    images = {"image_ids": options.get("image_ids", torch.arange(6)), "text_ids": fewer.get("image_ids", kept)}
    label = torch.tensor([0, 1, 2, 3, -1, 4])
    more = {k: v for k, v in options.items() if k != "image_ids"}
    want = gradients(late_interaction_loss(x, y[kept], scale, labels=label, **images, **more), (x, y, scale))
    assert_same(got, want)


def test_no_token_anywhere_and_empty_batches_give_zero():
    x, y, scale = leaves()
    none = torch.zeros(6, 4, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    for how in ({"image_mask": none[0]}, {"text_mask": none[1]}, {"image_mask": none[0], "text_mask": none[1]}):
        for more in ({}, {"label_smoothing": 0.1}, {"directions": "text"}, {"interaction": "colbert"}):
            found = gradients(late_interaction_loss(x, y, scale, **how, **more), (x, y, scale))
            assert not any(v.any() for v in found)
    label = torch.zeros(0, dtype=torch.int64)
    for a, b, how in ((x[:0], y[:0], {}), (x[:0], y, {"labels": label}), (x, y[:0], {"labels": torch.full((6,), -1)})):
        loss = late_interaction_loss(a, b, scale, **how)
        assert loss == 0 and not any(v.any() for v in torch.autograd.grad(loss, (x, y, scale), allow_unused=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_reach_loss_and_gradients(value):
    x, y, scale = leaves()
    for k in (0, 1):
        tensors = [x.detach().clone(), y.detach().clone()]
        tensors[k][2, 1, 3] = value
        tensors = [v.requires_grad_() for v in tensors]
        loss, *found = gradients(late_interaction_loss(*tensors, scale), tensors)
        assert not loss.isfinite() and not any(v.isfinite().all() for v in found)


def test_relevance_weighs_the_tokens_of_its_own_side():
    x, y, scale = leaves()
    r = [torch.rand(6, k).double().requires_grad_() for k in (4, 3)]
    s = torch.einsum("ipd,jtd->ijpt", x, y)
    w, v = (q / q.sum(1, keepdim=True) for q in r)
    a, b = torch.einsum("ip,ijp->ij", w, s.amax(3)), torch.einsum("jt,ijt->ij", v, s.amax(2))
    label = torch.arange(6)
    want = (F.cross_entropy(scale * a, label) + F.cross_entropy(scale * b.T, label)) / 2
    got = late_interaction_loss(x, y, scale, image_relevance=r[0], text_relevance=r[1])
    assert_same(gradients(got, (x, y, scale, *r)), gradients(want, (x, y, scale, *r)))
    larger = late_interaction_loss(x, y, scale, image_relevance=9 * r[0], text_relevance=r[1] / 7)
    torch.testing.assert_close(larger, got)


def test_equal_relevance_is_none_and_so_is_none_at_all():
    x, y, scale = leaves()
    mask = some(6, 4, 1)
    for interaction in ("filip", "colbert"):
        how = {"interaction": interaction, "image_mask": mask}
        plain = gradients(late_interaction_loss(x, y, scale, **how), (x, y, scale))
        for r in (torch.full((6, 4), 3.0), torch.zeros(6, 4), -torch.ones(6, 4)):
            assert_same(gradients(late_interaction_loss(x, y, scale, image_relevance=r, **how), (x, y, scale)), plain)
        nan = torch.ones(6, 4).masked_fill(~mask, torch.nan)  # on padding it is nobody's
        assert_same(gradients(late_interaction_loss(x, y, scale, image_relevance=nan, **how), (x, y, scale)), plain)


def test_a_token_of_no_relevance_still_matches_others():
    x, y, scale = leaves()
    r = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    got = late_interaction_loss(x, y, scale, image_relevance=r)
    image = late_interaction_loss(x[:, :1], y, scale, directions="image")
    text = late_interaction_loss(x, y, scale, directions="text")
    assert_same(gradients(got, (x, y, scale)), gradients((image + text) / 2, (x, y, scale)))


def test_the_bias_cancels():
    x, y, scale = leaves()
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    loss = late_interaction_loss(x, y, scale, bias)
    torch.testing.assert_close(loss, late_interaction_loss(x, y, scale))
    assert torch.autograd.grad(loss, bias)[0] == 0


def test_metrics_of_the_pair_scores():
    x, y, scale = sets(m=20)
    metrics = BatchMetrics()
    late_interaction_loss(x, y, scale, metrics=metrics)
    s = torch.einsum("ipd,jtd->ijpt", x, y)
    a, b, label = scale * s.amax(3).mean(2), scale * s.amax(2).mean(2), torch.arange(20)
    torch.testing.assert_close(metrics.image_accuracy, (a.argmax(1) == label).double().mean())
    torch.testing.assert_close(metrics.text_accuracy, (b.argmax(0) == label).double().mean())
    torch.testing.assert_close(metrics.image_lse, a.logsumexp(1).mean())
    torch.testing.assert_close(metrics.text_lse, b.logsumexp(0).mean())
    apart = torch.eye(20, dtype=torch.bool)
    assert torch.equal(metrics.hardest_text, a.masked_fill(apart, -torch.inf).argmax(1))
    assert torch.equal(metrics.hardest_image, b.masked_fill(apart, -torch.inf).argmax(0))
    again = BatchMetrics()
    with fastvlm_loss.backend("dense"):
        late_interaction_loss(x, y, scale, metrics=again)
    for name, value in vars(metrics).items():
        torch.testing.assert_close(getattr(again, name), value)


def test_the_module_takes_its_options():
    x, y, scale = sets()
    module = LateInteractionLoss(interaction="colbert", directions="text")
    want = late_interaction_loss(x, y, scale, interaction="colbert", directions="text", text_mask=some(6, 3, 2))
    assert torch.equal(module(x, y, scale, text_mask=some(6, 3, 2)), want)


def cross_entropies(scores, scale):
    return F.cross_entropy(scale * scores, torch.arange(len(scores), device=scores.device))


def test_equals_the_reference_of_late_interaction_kernels():
    peer = pytest.importorskip("late_interaction_kernels.reference")
    x, y, scale = leaves()
    masks = some(6, 4, 1), some(6, 3, 2)
    how = {"interaction": "colbert", "image_mask": masks[0], "text_mask": masks[1]}
    for directions, given in (("image", (x, y, *masks)), ("text", (y, x, *reversed(masks)))):
        want = cross_entropies(peer.maxsim_reference(*given), scale)
        got = late_interaction_loss(x, y, scale, directions=directions, **how)
        assert_same(gradients(got, (x, y, scale)), gradients(want, (x, y, scale)))


def test_equals_the_plain_form_of_flash_maxsim():
    pytest.importorskip("triton")  # which it imports
    peer = pytest.importorskip("flash_maxsim")
    x, y, scale = leaves()
    for directions, (query, document) in (("image", (x, y)), ("text", (y, x))):
        want = cross_entropies(peer.maxsim_naive_batched(query, document), scale)
        got = late_interaction_loss(x, y, scale, directions=directions, interaction="colbert")
        assert_same(gradients(got, (x, y, scale)), gradients(want, (x, y, scale)))


@pytest.mark.gpu
def test_equals_the_kernels_of_late_interaction_kernels():
    peer = pytest.importorskip("late_interaction_kernels")
    x, y, scale = (v.cuda() for v in sets(m=16, p=32, t=16, d=64, dtype=torch.float32))
    got = late_interaction_loss(x, y, scale, directions="text", interaction="colbert")
    want = cross_entropies(peer.maxsim(y, x), scale)
    # their operands may have 11 bits: each of 16 products of unit vectors is off by 2 * 2^-11, the loss by two scores
    assert (got - want).abs() <= 2 * scale * 16 * 2.0**-10


X, Y = torch.randn(4, 3, 8), torch.randn(4, 2, 8)
BAD = torch.ones(4, 3).index_fill(0, torch.tensor(1), torch.nan)
NAN, R_IMAGE, R_TEXT = X * BAD[..., None], {"image_relevance": -torch.ones(4, 3)}, {"text_relevance": torch.ones(4, 2)}
ERRORS = [
    (TypeError, "image_tokens: got list", {"image_tokens": [1.0]}),
    (TypeError, "text_tokens: got a int64 tensor of shape .4, 2, 8.", {"text_tokens": Y.long()}),
    (ValueError, r"image_tokens: got .*\[4, 8\], wanted shape \[rows, tokens, D\]", {"image_tokens": X[:, 0]}),
    (ValueError, r"text_tokens: got .*\[4, 0, 8\]", {"text_tokens": Y[:, :0]}),
    (ValueError, r"text_tokens: got .*\[4, 2, 7\], wanted D = 8 as in image_tokens", {"text_tokens": Y[..., :7]}),
    (TypeError, "text_tokens: got a bfloat16 .* wanted torch.float32 as in image_t", {"text_tokens": Y.bfloat16()}),
    (ValueError, "text_tokens: got a tensor on meta, wanted cpu", {"text_tokens": Y.to("meta")}),
    (TypeError, "image_tokens: got a torch.sparse_coo tensor", {"image_tokens": X.to_sparse()}),
    (ValueError, r"image_mask: got .*\[4, 2\], wanted shape \[4, 3\]", {"image_mask": torch.ones(4, 2).bool()}),
    (TypeError, "text_mask: got a float32 .* wanted a bool tensor", {"text_mask": torch.ones(4, 2)}),
    (TypeError, "text_mask: got list", {"text_mask": [True]}),
    (ValueError, "text_mask: got a tensor on meta", {"text_mask": torch.ones(4, 2).bool().to("meta")}),
    (ValueError, r"image_relevance: got .*\[4\], wanted shape \[4, 3\]", {"image_relevance": torch.ones(4)}),
    (TypeError, "text_relevance: got a int64", {"text_relevance": torch.ones(4, 2).long()}),
    (ValueError, "text_relevance: got a value beside directions='image'", {**R_TEXT, "directions": "image"}),
    (ValueError, "image_relevance: got a value beside directions='text'", {**R_IMAGE, "directions": "text"}),
    (ValueError, "image_relevance: got -1, wanted values >= 0", {**R_IMAGE, "check_finite": True}),
    (ValueError, "image_relevance: got NaN .* row 1", {"image_relevance": BAD, "check_finite": True}),
    (ValueError, "interaction: got 'sum', wanted one of 'filip', 'colbert'", {"interaction": "sum"}),
    (ValueError, "positives: got 'all'", {"positives": "all"}),
    (ValueError, "label_smoothing: got a number above 0 beside", {"positives": "in", "label_smoothing": 0.1}),
    (ValueError, "labels: got None for 4 image and 3 text", {"text_tokens": Y[:3]}),
    (ValueError, "labels: got 4 at index 2", {"labels": torch.tensor([0, 1, 4, 2])}),
    (ValueError, "logit_scale: got 0.0", {"logit_scale": 0.0}),
    (ValueError, "image_tokens: got NaN or infinity in row 1", {"image_tokens": NAN, "check_finite": True}),
    (TypeError, "normalize: got int 1", {"normalize": 1}),
    (TypeError, "group: got object", {"group": object()}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "options"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_the_message_names_the_argument(kind, message, options):
    with pytest.raises(kind, match=message) as caught:
        late_interaction_loss(**{"image_tokens": X, "text_tokens": Y, "logit_scale": 1.0, **options})
    assert "\n" not in str(caught.value)


def test_padding_may_hold_anything_where_values_are_checked():
    mask = torch.ones(4, 3, dtype=torch.bool).index_fill(1, torch.tensor(0), False)
    x = X.index_fill(1, torch.tensor(0), torch.nan)
    assert late_interaction_loss(x, Y, 1.0, image_mask=mask, check_finite=True).isfinite()


def test_a_backend_that_has_none_says_so():
    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    with fastvlm_loss.backend("cpp"), pytest.raises(ValueError, match="got 'cpp' for late interaction, wanted 'auto'"):
        late_interaction_loss(X, Y, 1.0)
