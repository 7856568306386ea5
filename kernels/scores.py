"""From a tile of products to scores, candidates and targets: what every kernel does before its epilogue."""

from .lang import LOG2E, jit, tl
from .layout import number, vector

IDS, POSITIVE = tl.constexpr(64), tl.constexpr(128)  # equal ids leave the candidates, or with POSITIVE are targets
# what `entries` holds, each a pointer or None
SCALE, BIAS, TEACHER_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TARGET, ROW_ID, COL_ID = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
ROW_FACTOR, COL_FACTOR = tl.constexpr(6), tl.constexpr(7)


@jit
def numbers(entries):
    """Scale, bias and the teacher's scale in bits, from memory: nobody waits for their values."""
    scale, bias = number(entries[SCALE], 1.0), number(entries[BIAS], 0.0)
    return scale * LOG2E, bias * LOG2E, number(entries[TEACHER_SCALE], 1.0) * LOG2E


@jit
def rows_of(entries, i, M, bias):
    """Of the rows `i`: additive score (-inf where there is no row), column of the target (-1: none), id, factor."""
    inside = i < M
    if entries[TARGET] is not None:
        target = vector(entries[TARGET], i, inside, -1).to(tl.int32)
    else:
        target = tl.where(inside, i, -1)
    added = tl.where(inside, bias, -float("inf"))
    return added, target, vector(entries[ROW_ID], i, inside, -1), vector(entries[ROW_FACTOR], i, inside, 0.0)


@jit
def columns_of(entries, j, N):
    """Of the columns `j`: index, whether it exists, id, factor."""
    inside = j < N
    return j, inside, vector(entries[COL_ID], j, inside, -1), vector(entries[COL_FACTOR], j, inside, 0.0)


@jit
def targets_within(target, paired: tl.constexpr, m0, n0, BM: tl.constexpr, BN: tl.constexpr):
    """Whether the tile at row m0 and column n0 holds the target of a row."""
    if paired:
        within = (m0 < n0 + BN) & (n0 < m0 + BM)
    else:
        within = tl.max(((target >= n0) & (target < n0 + BN)).to(tl.int32), 0) > 0
    return within


@jit
def hits(row, col, FLAGS: tl.constexpr):
    """Which entries of the tile are targets."""
    hit = row[1][:, None] == col[0][None, :]
    if FLAGS & POSITIVE:
        hit = hit | ((row[2][:, None] == col[2][None, :]) & (row[2] != -1)[:, None])
    return hit


@jit
def scores(acc, scale, row, col, N, FLAGS: tl.constexpr):
    """Scores in bits, -inf where an entry is no candidate."""
    s = acc * scale + row[0][:, None]
    s = tl.where(col[1][None, :], s, -float("inf"))  # no branch: it would keep both the products and the scores
    if FLAGS & IDS:
        out = (col[2] == -1)[None, :] | (row[2] == -1)[:, None]
        if not FLAGS & POSITIVE:
            out = out | ((row[2][:, None] == col[2][None, :]) & (row[1][:, None] != col[0][None, :]))
        s = tl.where(out, -float("inf"), s)
    return s
