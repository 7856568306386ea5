"""MatchingHead: it learns what a linear layer on the concatenation cannot; pairs by index; errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import MatchingHead, hard_negatives, itm_batch, itm_loss


def trained(head, steps=100, signs=False):
    """Loss and accuracy on pairs of two bits each, which match where the XOR of their first bits is 1."""
    cells = torch.cartesian_prod(*[torch.arange(2)] * 4)
    image, text = cells[:, :2].float(), cells[:, 2:].float()
    if signs:
        image, text = 2 * image - 1, 2 * text - 1
    label = cells[:, 0] ^ cells[:, 2]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(steps):
        loss = itm_loss(head(image, text), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), float((head(image, text).argmax(1) == label).double().mean())


class Linear(torch.nn.Module):
    """What the reference document has: a linear layer on the concatenation."""

    def __init__(self, dim):
        super().__init__()
        self.layer = torch.nn.Linear(2 * dim, 2)

    def forward(self, image, text):
        return self.layer(torch.cat([image, text], 1))


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_it_learns_xor_and_a_linear_head_does_not(seed, signs):
    torch.manual_seed(seed)
    loss, accuracy = trained(MatchingHead(2, 8), signs=signs)
    assert accuracy == 1.0 and loss < 0.05
    loss, accuracy = trained(Linear(2), signs=signs)
    # of all sums of a function of each a constant is best, and three of four right is the most
    assert accuracy <= 0.75 and loss > math.log(2) - 1e-6


def test_it_is_its_formula():
    head = MatchingHead(3, 5, dtype=torch.float64)
    x, y = torch.randn(2, 7, 3, dtype=torch.float64)
    z = torch.cat([x, y, x * y, (x - y).abs()], 1)
    want = F.linear(F.gelu(F.linear(z, head.inner.weight, head.inner.bias)), head.outer.weight, head.outer.bias)
    torch.testing.assert_close(head(x, y), want)
    assert MatchingHead(6).hidden == 6 and "dim=3, hidden=5" in repr(head)


def test_gradcheck_with_pairs_by_index():
    torch.manual_seed(0)
    head = MatchingHead(3, 4, dtype=torch.float64)
    x, y = torch.randn(4, 3).double().requires_grad_(), torch.randn(5, 3).double().requires_grad_()
    image, text = torch.tensor([0, 1, 2, 3, 1, 1]), torch.tensor([4, 0, 0, 2, 3, 1])
    assert torch.autograd.gradcheck(lambda x, y: head(x, y, image, text), (x, y))
    torch.testing.assert_close(head(x, y, image, text), head(x[image], y[text]))
    torch.testing.assert_close(head(x, y, text_index=text[:4]), head(x, y[text[:4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_the_pairs_of_a_batch(dtype):
    torch.manual_seed(0)
    head = MatchingHead(8, dtype=dtype)
    x, y = (F.normalize(torch.randn(6, 8), dim=1).to(dtype).requires_grad_() for _ in range(2))
    pairs = itm_batch(hard_negatives(x, y, 2, seed=1, step=0), seed=1, step=0)
    logits = head(x, y, pairs.image_index, pairs.text_index)
    assert logits.shape == (18, 2) and logits.dtype == dtype
    loss = itm_loss(logits, pairs.labels, pairs.weights)
    found = torch.autograd.grad(loss, [x, y, *head.parameters()])
    assert all(g.isfinite().all() and g.any() for g in found)


def test_a_row_in_many_pairs_adds_up_its_gradient_in_fp32():
    head = MatchingHead(4, dtype=torch.bfloat16)
    x, y = (torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    index = torch.zeros(3000, dtype=torch.int64)
    once = torch.autograd.grad(head(x, y, index[:1], index[:1]).sum(), x)[0]
    many = torch.autograd.grad(head(x, y, index, index).sum(), x)[0]
    torch.testing.assert_close(many.float(), 3000 * once.float(), rtol=2**-7, atol=0)


def test_autocast_empty_and_compiled():
    head, (x, y) = MatchingHead(8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x.bfloat16(), y).dtype == head(x, y.bfloat16()).dtype == torch.bfloat16
    assert head(x[:0], y[:0]).shape == (0, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert head(x, y, none, none).shape == (0, 2)
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, none + 1, none + 2), head(x, y, none + 1, none + 2))
    index = torch.tensor([1, 1, 4])
    torch.testing.assert_close(compiled(x, y, index, index), head(x, y, index, index))


HEAD, X, PLACE = MatchingHead(3), torch.randn(4, 3), torch.arange(4)
ERRORS = [
    (TypeError, "dim: got float 3.0, wanted an int", lambda: MatchingHead(3.0)),
    (ValueError, "dim: got 0, wanted at least 1", lambda: MatchingHead(0)),
    (ValueError, "hidden: got 0, wanted at least 1", lambda: MatchingHead(3, 0)),
    (TypeError, "image_features: got int", lambda: HEAD(1, X)),
    (ValueError, r"text_features: got .*\[4, 2\], wanted D = 3", lambda: HEAD(X, X[:, :2])),
    (TypeError, "text_features: got a float64 .*wanted torch.float32", lambda: HEAD(X, X.double())),
    (ValueError, r"image_features: got shape \[4, 2\], wanted D = 3", lambda: HEAD(X[:, :2], X[:, :2])),
    (ValueError, "text_index: got 3 texts for 4 images, wanted as many", lambda: HEAD(X, X[:3])),
    (TypeError, "image_index: got a float32", lambda: HEAD(X, X, X[0])),
    (ValueError, r"text_index: got 4 at index 3, wanted values in \[0, 4\)", lambda: HEAD(X, X, None, 1 + PLACE)),
    (ValueError, "image_index: got -1 at index 0", lambda: HEAD(X, X, PLACE - 1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[c[1][:40] for c in ERRORS])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
