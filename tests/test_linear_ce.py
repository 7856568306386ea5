"""linear_cross_entropy and what stands on it, against torch's cross-entropy of the logits."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import caption_loss, linear_cross_entropy, vqa_loss
from fastvlm_loss.engine import tile


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).requires_grad_() for s in ((6, 9, 16), (50, 16), (50,)))
    targets = torch.randint(0, 50, (6, 9), generator=g)
    targets[2, 3:] = -100
    return hidden, weight, targets, bias


def logits(hidden, weight, bias):
    return (hidden @ weight.T + bias).flatten(0, -2)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(head, eps, reduction):
    hidden, weight, targets, bias = head
    how = {"label_smoothing": eps, "reduction": reduction}
    got = linear_cross_entropy(hidden, weight, targets, bias, **how)
    want = F.cross_entropy(logits(hidden, weight, bias), targets.flatten(), **how)
    assert got.shape == (targets.shape if reduction == "none" else ())
    torch.testing.assert_close(got.flatten(), want.flatten(), rtol=1e-5, atol=1e-5)
    wanted = hidden, weight, bias
    gradients = (torch.autograd.grad(v.square().sum(), wanted) for v in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("option", ["plain", "smoothed", "taught"])
def test_gradients_made_along_with_the_sum_are_those_of_backward(head, live_backend, option, monkeypatch):
    hidden, weight, targets, bias = head
    w = torch.rand(6, 9).requires_grad_()
    taught = {"teacher_hidden": hidden.detach()[..., :8], "teacher_weight": weight.detach()[:, :8]}
    more = {"plain": {}, "smoothed": {"label_smoothing": 0.1}, "taught": taught}[option]
    results = []
    for small in (2**20, 0):  # kept products and backward; then strips of rows
        monkeypatch.setitem(tile.KEPT_PRODUCTS, live_backend, small)
        monkeypatch.setitem(tile.STRIP, live_backend, 50 * 20)
        loss = 3 * linear_cross_entropy(hidden, weight, targets, bias, token_weights=w, **more)
        assert ("Weighted" in str(loss.grad_fn.next_functions[0][0].next_functions[0][0])) == (not small)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    loss = linear_cross_entropy(hidden.detach(), weight, targets, bias, **more)
    assert [g.shape for g in torch.autograd.grad(loss, (weight, bias))] == [weight.shape, bias.shape]


def test_ignored_tokens_have_no_gradient_and_no_weight(head):
    hidden, weight, targets, bias = head
    kept = targets != -100
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], weight, targets[kept], bias))
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert not gradient[~kept].any() and gradient[kept].any()


def test_no_token_at_all_is_zero(head):
    hidden, weight, _, bias = head
    for shape in ((6, 9), (0, 9)):
        loss = linear_cross_entropy(hidden[: shape[0]], weight, torch.full(shape, -100), bias)
        assert loss.item() == 0.0  # torch: NaN
        none = linear_cross_entropy(
            hidden[: shape[0]], weight, torch.full(shape, -100), bias, normalizer=torch.tensor(0)
        )
        assert none.item() == 0.0
        assert all(
            not g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias), allow_unused=True) if g is not None
        )


def test_token_weights_and_normalizer(head):
    hidden, weight, targets, bias = head
    w = torch.rand(6, 9).requires_grad_()
    each = F.cross_entropy(logits(hidden, weight, bias), targets.flatten(), reduction="none").reshape(6, 9)
    counts = (targets != -100).float()
    want = (w * each).sum() / (w * counts).sum()
    got = linear_cross_entropy(hidden, weight, targets, bias, token_weights=w)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, w)[0], torch.autograd.grad(want, w)[0], rtol=1e-4, atol=1e-5)
    for size in (100, torch.tensor(100.0), torch.tensor(100)):
        got = linear_cross_entropy(hidden, weight, targets, bias, normalizer=size)
        torch.testing.assert_close(got, each.sum() / 100, rtol=1e-5, atol=1e-5)


def test_a_teacher_mixes_in_its_softmax(head):
    hidden, weight, targets, bias = head
    g = torch.Generator().manual_seed(1)
    th, tw = torch.randn(6, 9, 8, generator=g), torch.randn(50, 8, generator=g)
    z, kept = F.log_softmax(logits(hidden, weight, bias), 1), (targets != -100).flatten()
    soft = -((th @ tw.T).flatten(0, 1).softmax(1) * z).sum(1)[kept].mean()
    want = 0.6 * F.cross_entropy(z, targets.flatten()) + 0.4 * soft
    got = linear_cross_entropy(hidden, weight, targets, bias, teacher_hidden=th, teacher_weight=tw)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(v, (hidden, weight, bias)) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_rounds_the_operands_and_keeps_fp32_sums(head):
    hidden, weight, targets, bias = head
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, bias)
    assert got.dtype == torch.float32
    want = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, bias)
    assert torch.equal(got, want)


def test_captions_predict_the_next_token(head):
    hidden, weight, tokens, bias = head
    tokens = tokens.clamp(min=0)
    tokens[3, 5:] = 0
    want = F.cross_entropy(logits(hidden[:, :-1], weight, bias), tokens[:, 1:].flatten(), ignore_index=0)
    torch.testing.assert_close(caption_loss(hidden, weight, tokens, bias, pad_id=0), want, rtol=1e-5, atol=1e-5)
    lengths = torch.tensor([0, 1, 2, 3, 4, 9])
    targets = tokens.masked_fill(torch.arange(9) < lengths[:, None], -100)
    want = F.cross_entropy(logits(hidden[:, :-1], weight, bias), targets[:, 1:].flatten())
    got = caption_loss(hidden, weight, tokens, bias, prompt_lengths=lengths)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want = F.cross_entropy(logits(hidden, weight, bias), targets.flatten())
    got = caption_loss(hidden, weight, tokens, bias, prompt_lengths=lengths, shift=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_equals_open_clips_caption_loss(head):
    open_clip = pytest.importorskip("open_clip")
    hidden, weight, tokens, bias = head
    tokens = tokens.clamp(min=0)
    coca = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.0, pad_id=0)
    z = (hidden @ weight.T + bias)[:, :-1]
    _, want = coca(None, None, z, tokens[:, 1:], None)
    torch.testing.assert_close(2 * caption_loss(hidden, weight, tokens, bias, pad_id=0), want, rtol=1e-5, atol=1e-5)


def test_answers_sum_tokens_and_average_images(head):
    hidden, weight, tokens, bias = head
    tokens, w = tokens.clamp(min=0), torch.tensor([0.5, 0.5, 1.0, 0.2, 0.3, 0.5], requires_grad=True)
    each = F.cross_entropy(logits(hidden[:, :-1], weight, bias), tokens[:, 1:].flatten(), reduction="none")
    want = (w * each.reshape(6, 8).sum(1)).sum() / 3
    got = vqa_loss(hidden, weight, tokens, w, 3, bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, w)[0], torch.autograd.grad(want, w)[0], rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(vqa_loss(hidden[order], weight, tokens[order], w[order], 3, bias), got)
    one = vqa_loss(hidden[0], weight, tokens[0], torch.tensor(1.0), 1, bias)
    torch.testing.assert_close(one, 8 * caption_loss(hidden[0], weight, tokens[0], bias))


ERRORS = [
    (ValueError, "targets: got 50 at index 7 of 54 tokens", lambda h, w, t, b: linear_cross_entropy(h, w, t.flatten().index_fill(0, torch.tensor(7), 50).reshape(6, 9), b)),
    (ValueError, "targets: got -1 at index 0", lambda h, w, t, b: linear_cross_entropy(h, w, torch.full((6, 9), -1), b)),
    (ValueError, r"targets: got .*\[9\], wanted shape \[6, 9\]", lambda h, w, t, b: linear_cross_entropy(h, w, t[0], b)),
    (TypeError, "targets: got a float32", lambda h, w, t, b: linear_cross_entropy(h, w, t.float(), b)),
    (ValueError, r"weight: got .*\[50, 3\], wanted D = 16 as in hidden", lambda h, w, t, b: linear_cross_entropy(h, w[:, :3], t, b)),
    (ValueError, r"bias: got .*\[49\], wanted shape \[50\]", lambda h, w, t, b: linear_cross_entropy(h, w, t, b[1:])),
    (TypeError, "weight: got a bfloat16 .* wanted torch.float32 as in hidden", lambda h, w, t, b: linear_cross_entropy(h, w.bfloat16(), t, b)),
    (ValueError, "teacher_weight: got None", lambda h, w, t, b: linear_cross_entropy(h, w, t, b, teacher_hidden=h)),
    (ValueError, "label_smoothing: got a number above 0 beside a teacher", lambda h, w, t, b: linear_cross_entropy(h, w, t, b, teacher_hidden=h, teacher_weight=w, label_smoothing=0.1)),
    (ValueError, "normalizer: got a value beside reduction='sum'", lambda h, w, t, b: linear_cross_entropy(h, w, t, b, reduction="sum", normalizer=3)),
    (ValueError, r"token_weights: got .*\[9, 6\], wanted shape \[6, 9\]", lambda h, w, t, b: linear_cross_entropy(h, w, t, b, token_weights=torch.ones(9, 6))),
    (ValueError, r"tokens: got .*\[6, 8\], wanted shape \[6, 9\]", lambda h, w, t, b: caption_loss(h, w, t[:, 1:], b)),
    (ValueError, r"prompt_lengths: got .*\[5\], wanted shape \[6\]", lambda h, w, t, b: caption_loss(h, w, t, b, prompt_lengths=torch.ones(5).long())),
    (ValueError, "images: got 0, wanted at least 1", lambda h, w, t, b: vqa_loss(h, w, t, torch.ones(6), 0, b)),
    (ValueError, r"answer_weights: got .*\[5\], wanted shape \[6\]", lambda h, w, t, b: vqa_loss(h, w, t, torch.ones(5), 3, b)),
    (TypeError, "hidden: got list", lambda h, w, t, b: linear_cross_entropy([1.0], w, t, b)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[e[1][:45] for e in ERRORS])
def test_errors_name_the_argument(head, kind, message, call):
    hidden, weight, targets, bias = head
    with pytest.raises(kind, match=message):
        call(hidden, weight, targets.clamp(min=0), bias)
