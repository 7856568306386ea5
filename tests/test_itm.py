"""itm_loss: cross-entropy of match logits, weights, query tokens, what has no part in it, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import ITMLoss, itm_loss

LN2 = math.log(2)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(n, seed=1):
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))


def gradients(loss, tensors):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_cross_entropy(dtype, scale):
    x, y = (scale * normal(40, 2)).to(dtype).requires_grad_(), bits(40)
    wide = x.detach().double().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        got, dx = gradients(itm_loss(x, y, reduction=reduction), (x,))
        want, d_want = gradients(F.cross_entropy(wide, y, reduction=reduction), (wide,))
        assert got.dtype == torch.promote_types(dtype, torch.float32) and dx.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-6)
        torch.testing.assert_close(dx, d_want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_weighted_mean_and_its_gradients():
    x, y, w = normal(30, 2).requires_grad_(), bits(30), normal(30, seed=2).abs().requires_grad_()
    each = F.cross_entropy(x, y, reduction="none")
    want = gradients((w * each).sum() / w.sum(), (x, w))
    got = gradients(itm_loss(x, y, w), (x, w))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    # dx_1 = -dx_0 = w / sum w (sigmoid(x_1 - x_0) - y)
    g = w / w.sum() * ((x[:, 1] - x[:, 0]).sigmoid() - y)
    torch.testing.assert_close(got[1], torch.stack([-g, g], 1).detach())
    torch.testing.assert_close(itm_loss(x, y, w, reduction="sum"), (w * each).sum())
    torch.testing.assert_close(itm_loss(x, y, w, reduction="none"), w * each)


def test_query_tokens_are_averaged_before_the_loss():
    x, y = normal(12, 5, 2).requires_grad_(), bits(12)
    for a, b in zip(gradients(itm_loss(x, y), (x,)), gradients(F.cross_entropy(x.mean(1), y), (x,)), strict=True):
        torch.testing.assert_close(a, b)


def test_query_tokens_are_averaged_in_fp32():
    x, y = normal(50, 32, 2, dtype=torch.bfloat16), bits(50)
    torch.testing.assert_close(itm_loss(x, y).double(), F.cross_entropy(x.double().mean(1), y), rtol=1e-6, atol=0)


def test_closed_values():
    y = bits(9)
    assert itm_loss(torch.zeros(9, 2), y).item() == pytest.approx(LN2)
    x = normal(9, 2)
    torch.testing.assert_close(itm_loss(x.flip(1), 1 - y), itm_loss(x, y))  # swap columns and labels
    torch.testing.assert_close(itm_loss(x + normal(9, 1, seed=3), y), itm_loss(x, y))
    torch.testing.assert_close(itm_loss(x, y.bool()), itm_loss(x, y))
    sure = torch.tensor([[0.0, 1000.0]])
    assert itm_loss(sure, torch.tensor([1])).item() == 0.0 and itm_loss(sure, torch.tensor([0])).item() == 1000.0
    small = torch.tensor([[0.0, 40.0]], dtype=torch.float64)
    assert itm_loss(small, torch.tensor([1])).item() == pytest.approx(math.exp(-40), rel=1e-12)


@pytest.mark.parametrize("shape", [(0, 2), (0, 3, 2)])
def test_no_pairs_give_zero(shape):
    x = torch.zeros(shape, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for weights in (None, torch.zeros(0)):
        loss, dx = gradients(itm_loss(x, none, weights), (x,))
        assert loss.item() == 0.0 and dx.shape == shape


def test_weights_of_zero_give_zero():
    x, w = normal(4, 2).requires_grad_(), torch.zeros(4)
    loss, dx = gradients(itm_loss(x, bits(4), w), (x,))
    assert loss.item() == 0.0 and not dx.any()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_label_of_minus_one_takes_a_pair_out_whatever_its_logits(bad):
    x, y, w = normal(6, 2), bits(6), normal(6, seed=2).abs()
    kept, out = torch.tensor([0, 1, 3, 5]), torch.tensor([2, 4])
    x = x.index_fill(0, out, bad).requires_grad_()
    got, dx = gradients(itm_loss(x, y.index_fill(0, out, -1), w), (x,))
    torch.testing.assert_close(got, itm_loss(x[kept], y[kept], w[kept]).detach())
    assert dx.isfinite().all() and not dx[out].any() and dx[kept].all()


def test_nan_is_not_hidden():
    x = normal(4, 2).index_fill(0, torch.tensor(1), math.nan).requires_grad_()
    loss, dx = gradients(itm_loss(x, bits(4)), (x,))
    assert loss.isnan() and dx[1].isnan().all() and dx[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(7, 2), (5, 3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(shape, reduction):
    x, w = normal(*shape).requires_grad_(), (normal(shape[0], seed=2).abs() + 0.1).requires_grad_()
    y = bits(shape[0]).index_fill(0, torch.tensor(2), -1)
    assert torch.autograd.gradcheck(lambda x, w: itm_loss(x, y, w, reduction=reduction), (x, w))


def test_the_loss_compiles_in_one_graph():
    torch.compiler.reset()
    x, y, w = normal(8, 3, 2, dtype=torch.float32).requires_grad_(), bits(8), torch.rand(8).requires_grad_()
    compiled = torch.compile(itm_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(x, y, w), (x, w)), gradients(itm_loss(x, y, w), (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing_and_the_module_is_the_function():
    x, y = normal(8, 2, dtype=torch.float32), bits(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(itm_loss(x, y), itm_loss(x, y)) and itm_loss(x, y).dtype == torch.float32
    assert torch.equal(ITMLoss(reduction="sum")(x, y), itm_loss(x, y, reduction="sum"))


Z, Y = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
ERRORS = [
    (TypeError, "logits: got list, wanted a floating", lambda: itm_loss([[0.0, 1.0]], Y)),
    (TypeError, "logits: got torch.int64", lambda: itm_loss(Z.long(), Y)),
    (ValueError, r"logits: got shape \[4, 3\], wanted \[n, 2\] or", lambda: itm_loss(torch.zeros(4, 3), Y)),
    (ValueError, r"logits: got shape \[4\]", lambda: itm_loss(torch.zeros(4), Y)),
    (ValueError, r"logits: got shape \[4, 0, 2\], .* Q >= 1", lambda: itm_loss(torch.zeros(4, 0, 2), Y)),
    (TypeError, "labels: got a float32 tensor", lambda: itm_loss(Z, Y.float())),
    (TypeError, "labels: got list", lambda: itm_loss(Z, [0, 1, 1, 0])),
    (ValueError, r"labels: got .*\[3\], wanted shape \[4\]", lambda: itm_loss(Z, Y[:3])),
    (ValueError, r"labels: got 2 at index 1, wanted values in \[-1, 2\)", lambda: itm_loss(Z, 2 * Y)),
    (ValueError, "labels: got a tensor on meta", lambda: itm_loss(Z, Y.to("meta"))),
    (TypeError, "weights: got a int64 tensor", lambda: itm_loss(Z, Y, Y)),
    (ValueError, r"weights: got .*\[1\], wanted shape \[4\]", lambda: itm_loss(Z, Y, torch.ones(1))),
    (ValueError, "reduction: got 'avg', wanted one of", lambda: itm_loss(Z, Y, reduction="avg")),
    (ValueError, "logits: got NaN .* row 0", lambda: itm_loss(Z / 0, Y, check_finite=True)),
    (ValueError, "weights: got NaN .* row 0", lambda: itm_loss(Z, Y, Z[:, 0] / 0, check_finite=True)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[c[1][:40] for c in ERRORS])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
