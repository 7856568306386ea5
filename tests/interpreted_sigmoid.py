"""Run by test_kernels.py in its own process: the sigmoid tile functions in Triton's interpreter, to every digit."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from fastvlm_loss.kernels.epilogues import sigmoid
from fastvlm_loss.kernels.lang import as_torch

interpreter.install()

value, gradient, shared_gradient = sigmoid.value, sigmoid.gradient, sigmoid.shared_gradient
FACTOR = 16
LN2 = 0.6931471805599453
M, N = 32, 64


@triton.jit
def sweep(S, HIT, ROW, COL, LOSS, G, M: tl.constexpr, N: tl.constexpr, FLAGS: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    s, row, col = tl.load(S + at), (tl.load(ROW + i),), (tl.load(COL + j),)
    if HIT is not None:
        hit = tl.load(HIT + at) != 0
        g = gradient(s, s, hit, None, row, col, 0.0, FLAGS)
    else:
        hit = None
        g = shared_gradient(s, 0.0, row, col, FLAGS)
    tl.store(LOSS + at, value(s, hit, row, col, FLAGS))
    tl.store(G + at, g)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("with_hit", [True, False])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 1000.0])
def test_every_entry_keeps_its_digits(weighted, with_hit, size):
    g = torch.Generator().manual_seed(0)
    s, row, col = size * torch.randn(M, N, generator=g), torch.rand(M, generator=g), torch.rand(N, generator=g)
    s[0, :4] = torch.tensor([0.0, -4.0, -4.00001, 4.0])  # about where the series takes over
    s[5] = -torch.inf  # no candidates
    hit = (torch.rand(M, N, generator=g) < 0.3) & (s > -torch.inf)
    loss, pull = torch.full((M, N), torch.nan), torch.full((M, N), torch.nan)
    sweep[(1,)](s, hit.int() if with_hit else None, row, col, loss, pull, M, N, FACTOR * weighted)

    marks, weight = hit & with_hit, row.double()[:, None] * col.double()[None, :] if weighted else 1.0
    nats = torch.where(marks, -s, s).double() * LN2
    sign = torch.where(marks, -1.0, 1.0)
    tiny = 1e-37  # below it fp32 has fewer digits
    torch.testing.assert_close(
        loss.double() * LN2, torch.logaddexp(nats, torch.zeros(())) * weight, rtol=1e-6, atol=tiny
    )
    torch.testing.assert_close(pull.double(), sign * nats.sigmoid() * weight, rtol=1e-6, atol=tiny)

    twin = as_torch(value)(s, hit if with_hit else None, (row,), (col,), FACTOR * weighted)
    torch.testing.assert_close(loss, twin, rtol=1e-6, atol=tiny)
