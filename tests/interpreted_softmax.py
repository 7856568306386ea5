"""Run by test_kernels.py in its own process: the softmax tile functions in Triton's interpreter against PyTorch."""

import sys

import torch
import triton
import triton.language as tl
from fastvlm_loss.kernels.epilogues import softmax
from fastvlm_loss.kernels.lang import as_torch

partial, merge, gradient = softmax.partial, softmax.merge, softmax.gradient


@triton.jit
def _vectors(pointer, offsets, length, COUNT: tl.constexpr):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(pointer + k * length + offsets),)
    return out


@triton.jit
def fold(S, HIT, ROW, COL, M: tl.constexpr, N: tl.constexpr, GAP: tl.constexpr, FIELDS: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    s, hit = tl.load(S + at), tl.load(HIT + at) != 0
    row = partial(s, hit, 1, GAP)
    row = merge(row, partial(s * 0.5, hit, 1, GAP), GAP)
    col = partial(s, hit, 0, GAP)
    for k in tl.static_range(FIELDS):
        tl.store(ROW + k * M + i, row[k])
        tl.store(COL + k * N + j, col[k])


@triton.jit
def backward(S, HIT, ROW, COL, G, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
             GAP: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    s, hit = tl.load(S + at), tl.load(HIT + at) != 0
    g = gradient(s, hit, _vectors(ROW, i, M, COUNT), _vectors(COL, j, N, COUNT), ROWS, COLS, GAP)
    tl.store(G + at, g)


def main() -> None:
    torch.manual_seed(0)
    m, n = 32, 64
    s = 5 * torch.randn(m, n)
    s[torch.rand(m, n) < 0.2] = -torch.inf
    s[3], s[:, 7] = -torch.inf, -torch.inf  # no candidate at all
    hit = torch.zeros(m, n, dtype=torch.int32)
    hit[torch.arange(m), torch.randperm(n)[:m]] = 1
    hit[s == -torch.inf] = 0
    for gap in (False, True):
        fields = 5 if gap else 3
        row, col = torch.full((fields, m), torch.nan), torch.full((fields, n), torch.nan)
        fold[(1,)](s, hit, row, col, m, n, gap, fields)
        twin, join = as_torch(softmax.partial), as_torch(softmax.merge)
        want_row = join(twin(s, hit != 0, 1, gap), twin(s * 0.5, hit != 0, 1, gap), gap)
        torch.testing.assert_close(row, torch.stack(want_row), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(col, torch.stack(twin(s, hit != 0, 0, gap)), rtol=1e-6, atol=1e-5)
        count = 4 if gap else 3
        rows, cols = torch.rand(count, m), torch.rand(count, n)
        rows[0], cols[0] = 20.0, 21.0
        for use_rows, use_cols in ((True, True), (True, False), (False, True)):
            g = torch.full((m, n), torch.nan)
            backward[(1,)](s, hit, rows, cols, g, m, n, use_rows, use_cols, gap, count)
            want = as_torch(softmax.gradient)(s, hit != 0, rows, cols, use_rows, use_cols, gap)
            torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-7)
    print("equal")


if __name__ == "__main__":
    sys.exit(main())
