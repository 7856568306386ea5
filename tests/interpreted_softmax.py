"""Run by test_kernels.py in its own process: the softmax tile functions in Triton's interpreter against PyTorch."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from fastvlm_loss.kernels.epilogues import softmax
from fastvlm_loss.kernels.lang import as_torch

interpreter.install()

partial, merge, gradient = softmax.partial, softmax.merge, softmax.gradient
shared_partial, shareable, shared_gradient = softmax.shared_partial, softmax.shareable, softmax.shared_gradient
ROWS, COLS, GAP, TEACHER, FACTOR = 1, 2, 4, 8, 16
FLAGS = [3, 3 | GAP, 3 | FACTOR, 3 | GAP | TEACHER, 3 | GAP | TEACHER | FACTOR]
M, N = 32, 64


def fields(flags):
    """How many numbers a state has."""
    return 3 + bool(flags & FACTOR) + 2 * bool(flags & GAP) + bool(flags & TEACHER)


@triton.jit
def _vectors(pointer, at, length, COUNT: tl.constexpr):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(pointer + k * length + at),)
    return out


@triton.jit
def _store(pointer, at, length, values):
    for k in tl.static_range(len(values)):
        tl.store(pointer + k * length + at, values[k])


@triton.jit
def _tile(S, HIT, TEACHING, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    hit, teacher = None, None
    if HIT is not None:
        hit = tl.load(HIT + at) != 0
    if TEACHING is not None:
        teacher = tl.load(TEACHING + at)
    return at, tl.load(S + at), hit, teacher


@triton.jit
def fold(S, HIT, TEACHING, ROW_FACTOR, COL_FACTOR, ROW, COL, M: tl.constexpr, N: tl.constexpr, FLAGS: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    _, s, hit, teacher = _tile(S, HIT, TEACHING, M, N)
    row_factor, col_factor = tl.load(ROW_FACTOR + i), tl.load(COL_FACTOR + j)
    row = partial(s, hit, teacher, row_factor, 1, FLAGS)
    row = merge(row, partial(s * 0.5, hit, teacher, row_factor, 1, FLAGS), FLAGS)
    _store(ROW, i, M, row)
    _store(COL, j, N, partial(s, hit, teacher, col_factor, 0, FLAGS))


@triton.jit
def backward(S, HIT, TEACHING, ROW, COL, G, M: tl.constexpr, N: tl.constexpr, FLAGS: tl.constexpr,
             COUNT: tl.constexpr):  # fmt: skip
    at, s, hit, teacher = _tile(S, HIT, TEACHING, M, N)
    row, col = _vectors(ROW, tl.arange(0, M), M, COUNT), _vectors(COL, tl.arange(0, N), N, COUNT)
    tl.store(G + at, gradient(s, hit, teacher, row, col, FLAGS))


@triton.jit
def share(S, SHIFT, ROW, COL, OP_ROW, OP_COL, G, KEPT, M: tl.constexpr, N: tl.constexpr, FLAGS: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at, s, _, _ = _tile(S, None, None, M, N)
    to_row, to_col, kept = shared_partial(s, tl.load(SHIFT), FLAGS)
    _store(ROW, i, M, to_row)
    _store(COL, j, N, to_col)
    row, col = _vectors(OP_ROW, i, M, 3), _vectors(OP_COL, j, N, 3)
    shift, may = shareable(row, col, FLAGS)
    tl.store(G + at, shared_gradient(s, shift, row, col, FLAGS))
    tl.store(KEPT, kept.to(tl.int32))
    tl.store(KEPT + 1, may.to(tl.int32))


@pytest.fixture
def tile():
    """Scores with entries, rows and columns that are no candidates, targets, teacher scores and factors."""
    g = torch.Generator().manual_seed(0)
    s = 5 * torch.randn(M, N, generator=g)
    s[torch.rand(M, N, generator=g) < 0.2] = -torch.inf
    s[3], s[:, 7] = -torch.inf, -torch.inf
    hit = torch.zeros(M, N, dtype=torch.int32)
    hit[torch.arange(M), torch.randperm(N, generator=g)[:M]] = 1
    hit[s == -torch.inf] = 0
    factors = torch.rand(M, generator=g), torch.rand(N, generator=g)
    factors[0][5] = factors[1][5] = 0.0
    return s, hit, 3 * torch.randn(M, N, generator=g), factors


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("with_hit", [True, False])
def test_states_equal_those_of_pytorch(tile, flags, with_hit):
    s, hit, teacher, (row_factor, col_factor) = tile
    hit, teacher = hit if with_hit else None, teacher if flags & TEACHER else None
    row, col = torch.full((fields(flags), M), torch.nan), torch.full((fields(flags), N), torch.nan)
    fold[(1,)](s, hit, teacher, row_factor, col_factor, row, col, M, N, flags)
    twin, join, marks = as_torch(partial), as_torch(merge), None if hit is None else hit != 0
    want = join(*(twin(t, marks, teacher, row_factor, 1, flags) for t in (s, s * 0.5)), flags)
    torch.testing.assert_close(row, torch.stack(want), rtol=1e-6, atol=1e-5)
    want = twin(s, marks, teacher, col_factor, 0, flags)
    torch.testing.assert_close(col, torch.stack(want), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("directions", [ROWS | COLS, ROWS, COLS])
@pytest.mark.parametrize("with_hit", [True, False])
def test_gradient_tiles_equal_those_of_pytorch(tile, flags, directions, with_hit):
    flags = flags & ~3 | directions
    s, hit, teacher, _ = tile
    hit, teacher = hit if with_hit else None, teacher if flags & TEACHER else None
    count = fields(flags) - bool(flags & GAP)  # an operand has 1 / n in it
    rows, cols = torch.rand(count, M), torch.rand(count, N)
    rows[0], cols[0] = 20.0, 21.0
    got = torch.full((M, N), torch.nan)
    backward[(1,)](s, hit, teacher, rows, cols, got, M, N, flags, count)
    want = as_torch(gradient)(s, None if hit is None else hit != 0, teacher, rows, cols, flags)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


ANY = {ROWS, COLS, ROWS | COLS}
HIGH_ROW = 1000.0 * (torch.arange(M)[:, None] == 5)


@pytest.mark.parametrize("directions", ANY)
@pytest.mark.parametrize(
    ("change", "kept", "may"),  # of one exponential: for which directions the forward and the gradient may use it
    [
        (lambda s: s, ANY, ANY),
        (lambda s: s + 20, ANY, ANY),
        (lambda s: s * 50, {}, {}),
        (lambda s: s + 110, {}, ANY),
        (lambda s: s + 200, {}, ANY),
        (lambda s: s - 200, {}, ANY),
        (lambda s: s + HIGH_ROW, {}, {COLS}),
        (lambda s: s - HIGH_ROW, {COLS}, {COLS}),
    ],
    ids=["near", "above", "wide", "high", "far above", "far below", "one high row", "one low row"],
)
def test_one_exponential_loses_nothing_or_says_so(directions, change, kept, may):
    s = change(3 * torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    twin = as_torch(partial)
    exact = [twin(s.double(), None, None, None, axis, 3) for axis in (1, 0)]
    operands = [torch.stack([m, torch.rand_like(m) / l, torch.rand_like(m)]).float() for m, l, *_ in exact]  # noqa: E741
    rows, cols = torch.full((3, M), torch.nan), torch.full((3, N), torch.nan)
    g, said = torch.full((M, N), torch.nan), torch.zeros(2, dtype=torch.int32)
    share[(1,)](s, torch.tensor([1.5]), rows, cols, *operands, g, said, M, N, directions)
    assert said.tolist() == [directions in kept, directions in may]
    if directions in kept:
        for got, want, asked in zip((rows, cols), exact, (directions & ROWS, directions & COLS), strict=True):
            if asked:
                error = (got[0] + got[1].log2()).double() - (want[0] + want[1].log2())
                assert error.abs().max() < 1e-5
    if directions in may:
        want = as_torch(gradient)(s.double(), None, None, *(o.double() for o in operands), directions)
        assert (g - want).abs().max() < 1e-5 * want.abs().max()
