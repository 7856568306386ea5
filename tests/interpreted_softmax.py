"""Run by test_kernels.py in its own process: tile functions along rows and columns in Triton against PyTorch."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from fastvlm_loss.kernels.epilogues import hinge, softmax
from fastvlm_loss.kernels.lang import as_torch

from fastvlm_loss.scores.statistics import Hinge, Softmax

interpreter.install()

shared_partial, shareable, shared_gradient = softmax.shared_partial, softmax.shareable, softmax.shared_gradient
ROWS, COLS, GAP, TEACHER, FACTOR, HARDEST, INSIDE, HARDNESS, SWAPPED = 1, 2, 4, 8, 16, 32, 256, 512, 1024
TAUGHT = GAP | TEACHER
SOFTMAX = [0, GAP, FACTOR, TAUGHT, TAUGHT | FACTOR, INSIDE, HARDNESS]
SHAPES = [(softmax, 3 | f | h) for f in SOFTMAX for h in (0, HARDEST)] + [(hinge, 3), (hinge, 3 | HARDEST)]
PULLS = [(softmax, f) for f in [*SOFTMAX, TAUGHT | SWAPPED, TAUGHT | FACTOR | SWAPPED]] + [(hinge, 0)]
BETA = 0.6
M, N = 32, 64


def of(epilogue, flags):
    """The statistic of a tile function and its flags."""
    return (Hinge if epilogue is hinge else Softmax).of(flags | 128 * bool(flags & INSIDE))


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
def fold(S, HIT, TEACHING, ROW_FACTOR, COL_FACTOR, ROW, COL, M: tl.constexpr, N: tl.constexpr, BETA, FOLD: tl.constexpr,
         FLAGS: tl.constexpr):  # fmt: skip
    partial: tl.constexpr = FOLD[1]
    merge: tl.constexpr = FOLD[2]
    i, j = tl.arange(0, M), tl.arange(0, N)
    _, s, hit, teacher = _tile(S, HIT, TEACHING, M, N)
    row_factor, col_factor = tl.load(ROW_FACTOR + i), tl.load(COL_FACTOR + j)
    at_row, at_col = i.to(tl.float32), j.to(tl.float32)
    row = partial(s, hit, teacher, row_factor, at_col, BETA, 1, FLAGS)
    row = merge(row, partial(s * 0.5, hit, teacher, row_factor, at_col + N, BETA, 1, FLAGS), FLAGS)
    _store(ROW, i, M, row)
    _store(COL, j, N, partial(s, hit, teacher, col_factor, at_row, BETA, 0, FLAGS))


@triton.jit
def backward(S, TO_COL, HIT, TEACHING, ROW, COL, G, M: tl.constexpr, N: tl.constexpr, BETA, PULL: tl.constexpr,
             FLAGS: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    gradient: tl.constexpr = PULL[0]
    at, s, hit, teacher = _tile(S, HIT, TEACHING, M, N)
    row, col = _vectors(ROW, tl.arange(0, M), M, COUNT), _vectors(COL, tl.arange(0, N), N, COUNT)
    tl.store(G + at, gradient(s, tl.load(TO_COL + at), hit, teacher, row, col, BETA, FLAGS))


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


@pytest.mark.parametrize(("epilogue", "flags"), SHAPES)
@pytest.mark.parametrize("with_hit", [True, False])
def test_states_equal_those_of_pytorch(tile, epilogue, flags, with_hit):
    s, hit, teacher, (row_factor, col_factor) = tile
    hit, teacher, fields = hit if with_hit else None, teacher if flags & TEACHER else None, of(epilogue, flags).fields
    row, col = torch.full((fields, M), torch.nan), torch.full((fields, N), torch.nan)
    fold[(1,)](s, hit, teacher, row_factor, col_factor, row, col, M, N, BETA, epilogue.FOLD, flags)
    twin, join, marks = as_torch(epilogue.partial), as_torch(epilogue.merge), None if hit is None else hit != 0
    at_row, at_col = torch.arange(M) * 1.0, torch.arange(N) * 1.0
    parts = ((t, marks, teacher, row_factor, at, BETA, 1, flags) for t, at in ((s, at_col), (s * 0.5, at_col + N)))
    want = join(*(twin(*part) for part in parts), flags)
    torch.testing.assert_close(row, torch.stack(want), rtol=1e-6, atol=1e-5)
    want = twin(s, marks, teacher, col_factor, at_row, BETA, 0, flags)
    torch.testing.assert_close(col, torch.stack(want), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("epilogue", "flags"), PULLS)
@pytest.mark.parametrize("directions", [ROWS | COLS, ROWS, COLS])
@pytest.mark.parametrize("with_hit", [True, False])
def test_gradient_tiles_equal_those_of_pytorch(tile, epilogue, flags, directions, with_hit):
    s, hit, teacher, _ = tile
    hit, teacher, count = hit if with_hit else None, teacher if flags & TEACHER else None, of(epilogue, flags).operands
    to_col = s.masked_fill(torch.rand(M, N, generator=torch.Generator().manual_seed(1)) < 0.2, -torch.inf)
    rows, cols = torch.rand(count, M), torch.rand(count, N)
    if epilogue is softmax:
        rows[0], cols[0] = 20.0, 21.0
    if flags & (INSIDE | HARDNESS):
        rows[3], cols[3] = 20.0, 21.0
    got = torch.full((M, N), torch.nan)
    how = flags | directions
    backward[(1,)](s, to_col, hit, teacher, rows, cols, got, M, N, BETA, epilogue.PULL, how, count)
    twin, marks = as_torch(epilogue.gradient), None if hit is None else hit != 0
    want = twin(s, to_col, marks, teacher, rows, cols, BETA, how)
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
    twin = as_torch(softmax.partial)
    exact = [twin(s.double(), None, None, None, None, 0.0, axis, 3) for axis in (1, 0)]
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
        wide = s.double()
        want = as_torch(softmax.gradient)(wide, wide, None, None, *(o.double() for o in operands), 0.0, directions)
        assert (g - want).abs().max() < 1e-5 * want.abs().max()
