"""From a tile of products to scores, candidates and targets: what every kernel does before its epilogue."""

from .lang import LOG2E, jit, tl
from .layout import number, product, vector, vectors

# flags that concern which entries are candidates and what is added to them; IDS and BIASED are the kernels' own
IDS, POSITIVE = tl.constexpr(64), tl.constexpr(128)  # equal ids leave the candidates, or with POSITIVE are targets
LIMIT, GUIDE, MARGIN = tl.constexpr(2048), tl.constexpr(4096), tl.constexpr(8192)
HARDEST, HARDNESS = tl.constexpr(32), tl.constexpr(512)
BIASED = tl.constexpr(32768)  # columns have a bias each
# what `entries` holds, each a pointer or None
SCALE, BIAS, TEACHER_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TARGET, ROW_ID, COL_ID = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
ROW_FACTOR, COL_FACTOR, COL_BIAS = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
ROW_LIMIT, COL_LIMIT, NUMBERS = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)


@jit
def numbers(entries):
    """Scale, bias and the teacher's scale in bits, from memory: nobody waits for their values."""
    scale, bias = number(entries[SCALE], 1.0), number(entries[BIAS], 0.0)
    return scale * LOG2E, bias * LOG2E, number(entries[TEACHER_SCALE], 1.0) * LOG2E


@jit
def hardness(entries, FLAGS: tl.constexpr):
    """How hard negatives are weighted, where they are."""
    if FLAGS & HARDNESS:
        beta = tl.load(entries[NUMBERS])
    else:
        beta = 0.0
    return beta


@jit
def rows_of(entries, i, M, bias):
    """Of the rows `i`: additive score (-inf where there is no row), target's column (-1: none), id, factor, limits."""
    inside = i < M
    if entries[TARGET] is not None:
        target = vector(entries[TARGET], i, inside, -1).to(tl.int32)
    else:
        target = tl.where(inside, i, -1)
    added = tl.where(inside, bias, -float("inf"))
    row = (added, target, vector(entries[ROW_ID], i, inside, -1), vector(entries[ROW_FACTOR], i, inside, 0.0))
    return row + vectors(entries[ROW_LIMIT], 0, M, i, inside, 2)


@jit
def columns_of(entries, j, N):
    """Of the columns `j`: index, whether it exists, id, factor, limits; and last its bias."""
    inside = j < N
    col = (j, inside, vector(entries[COL_ID], j, inside, -1), vector(entries[COL_FACTOR], j, inside, 0.0))
    col = col + vectors(entries[COL_LIMIT], 0, N, j, inside, 2)
    return col + (vector(entries[COL_BIAS], j, inside, 0.0),)


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
    if FLAGS & IDS and FLAGS & POSITIVE:
        hit = hit | ((row[2][:, None] == col[2][None, :]) & (row[2] != -1)[:, None])
    return hit


@jit
def scores(acc, scale, row, col, FLAGS: tl.constexpr):
    """Scores in bits, -inf where an entry is no candidate."""
    s = acc * scale + row[0][:, None]
    if FLAGS & BIASED:
        s += (col[len(col) - 1] * LOG2E)[None, :]
    s = tl.where(col[1][None, :], s, -float("inf"))  # no branch: it would keep both the products and the scores
    if FLAGS & IDS:
        out = (col[2] == -1)[None, :] | (row[2] == -1)[:, None]
        if not FLAGS & POSITIVE:
            out = out | ((row[2][:, None] == col[2][None, :]) & (row[1][:, None] != col[0][None, :]))
        s = tl.where(out, -float("inf"), s)
    return s


@jit
def _within_limits(s, acc, second, hit, of, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    """Scores as the rows (`AXIS` 1) or columns (0) `of` see them: a negative above a limit is no candidate."""
    if FLAGS & LIMIT:
        s = tl.where((acc > tl.expand_dims(of[4], AXIS)) & (hit == 0), -float("inf"), s)
    if FLAGS & GUIDE:
        s = tl.where((second > tl.expand_dims(of[5], AXIS)) & (hit == 0), -float("inf"), s)
    return s


@jit
def exact_tile(x, y, tx, ty, entries, row, col, m0, n0, M, N, FLAGS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr):  # fmt: skip
    """Products (with the margin), scores as rows and as columns see them, targets, second scores in bits."""
    scale, _, second_scale = numbers(entries)
    acc = product(x, y, m0, n0, M, N, D[0], BM, BN, BK, LOAD)
    hit = hits(row, col, FLAGS)
    second, shifted = 0.0, acc
    if tx is not None:
        second = product(tx, ty, m0, n0, M * D[2], N, D[1], BM, BN, BK, LOAD)
        for k in range(1, D[2]):  # further rows of `tx` for each of `x`: the largest product counts, NaN before all
            other = product(tx, ty, k * M + m0, n0, M * D[2], N, D[1], BM, BN, BK, LOAD)
            second = tl.maximum(second, other, propagate_nan=tl.PropagateNan.ALL)
    if FLAGS & MARGIN:
        most, size = tl.load(entries[NUMBERS]), tl.load(entries[NUMBERS] + 1)
        margin = size - second * tl.load(entries[TEACHER_SCALE])
        margin = tl.minimum(most, margin, propagate_nan=tl.PropagateNan.ALL)
        shifted = acc + tl.where(hit, 0.0, margin)
    s = scores(shifted, scale, row, col, FLAGS)
    to_row = _within_limits(s, acc, second, hit, row, 1, FLAGS)
    to_col = _within_limits(s, acc, second, hit, col, 0, FLAGS)
    return shifted, to_row, to_col, hit, second * second_scale
