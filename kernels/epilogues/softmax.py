"""Softmax statistics of a score tile, in both directions, and their gradient tile.

Scores are in bits, s = log2(e) * (scale * <x, y> + bias), so that an exponential is one `exp2`. Along an axis the
state of a set of scores is the monoid `(m, l, p)`, and the options add fields of their own, in this order:

    m = max z      l = sum 2^(z - m)      p = sum of s over the targets              z = s, or factor * s with FACTOR
    FACTOR    u = sum 2^(z - m) s                               for the gradient of the factor
    GAP       t = sum s      n = count                          the uniform distribution over the candidates, or
      TEACHER t = sum 2^(v - q) s      n = sum 2^(v - q)      q = max v      the softmax of teacher scores v
    INSIDE    m2 = max s      l2 = sum 2^(s - m2)               both over the targets alone
    HARDNESS  m2 = max w      l2 = sum 2^(w - m2)      k = count     over the negatives alone, with w = beta s, and then
              m and l are over the negatives too, with z = (1 + beta) s
    HARDEST   the fields of `hardest`

`partial` makes it from a tile and `merge` joins two, for tiles, chunks, threads and ranks alike. A score of -inf
is not a candidate: it leaves every field as it is. (In a state, m may be any number near the maximum.) What the engine
differentiates is, in nats,

    nll = (factor m - factor p / targets) + log l          gap = factor (p / targets - t / n)
    nll = (m - m2) + log l - log l2                        INSIDE
    nll = (m - m2 - p / targets) + log l - log l2 + log k  HARDNESS: the log of the reweighted negatives over the target

so that label smoothing is `nll + eps * gap` and a soft target `nll + gap`. See objectives: InfoNCE, "Precision rules".
With SWAPPED the two score matrices have changed places, and `gradient` is with respect to the teacher's scores.

`shared_partial` and `shared_gradient` do the same with one exponential for both directions, about one shift for the
whole tile, and say whether that lost nothing; where it did, the kernel falls back on the two above.
"""

from ..lang import jit, tl
from .hardest import harder, hardest, nobody

ROWS, COLS, GAP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
TEACHER, FACTOR, HARDEST = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
INSIDE, HARDNESS, SWAPPED = tl.constexpr(256), tl.constexpr(512), tl.constexpr(1024)
LOW, HIGH = (
    tl.constexpr(2.0**-40),
    tl.constexpr(2.0**100),
)  # a sum within lost at most 2^-78 of itself
SPREAD = tl.constexpr(120.0)  # bits between the references of a gradient tile, so that no product overflows


@jit
def _finite(m):
    # a max of -inf (no candidate) must not turn -inf - (-inf) into NaN
    return tl.where(m == -float("inf"), 0.0, m)


@jit
def _scaled(s, factor, AXIS: tl.constexpr):
    return tl.where(s == -float("inf"), s, s * tl.expand_dims(factor, AXIS))  # a factor of 0 makes no NaN


@jit
def _times(s, beta):
    return tl.where(s == -float("inf"), s, s * beta)  # nor does a beta of 0


@jit
def _log_sum(z, AXIS: tl.constexpr):
    m = tl.max(z, AXIS)
    return m, tl.sum(tl.exp2(z - tl.expand_dims(_finite(m), AXIS)), AXIS)


@jit
def _target_sum(s, hit, like, AXIS: tl.constexpr):
    if hit is not None:
        p = tl.sum(tl.where(hit, s, 0.0), AXIS)
    else:
        p = like * 0.0
    return p


@jit
def _negatives(s, hit, beta, AXIS: tl.constexpr):
    away = s
    if hit is not None:
        away = tl.where(hit, -float("inf"), s)
    m, l = _log_sum(_times(away, 1.0 + beta), AXIS)  # noqa: E741
    m2, l2 = _log_sum(_times(away, beta), AXIS)
    return m, l, _target_sum(s, hit, l, AXIS), m2, l2, tl.sum(tl.where(away == -float("inf"), 0.0, 1.0), AXIS)


@jit
def partial(s, hit, teacher, factor, index, beta, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    """State of the tile `s` along `AXIS` (1: a row's columns, 0: a column's rows).

    `hit` marks targets; `teacher` are teacher scores; `factor` has one number a row (or column); `index` are the places
    along the axis. Each may be None where no flag asks for it.
    """
    if FLAGS & HARDNESS:
        state = _negatives(s, hit, beta, AXIS)
    else:
        state = _candidates(s, hit, teacher, factor, AXIS, FLAGS)
    if FLAGS & HARDEST:
        state = state + hardest(s, hit, index, AXIS)
    return state


@jit
def _candidates(s, hit, teacher, factor, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    z = s
    if FLAGS & FACTOR:
        z = _scaled(s, factor, AXIS)
    m = tl.max(z, AXIS)
    e = tl.exp2(z - tl.expand_dims(_finite(m), AXIS))
    l = tl.sum(e, AXIS)  # noqa: E741
    state = (m, l, _target_sum(s, hit, l, AXIS))
    live = s != -float("inf")
    if FLAGS & FACTOR:
        state = state + (tl.sum(e * tl.where(live, s, 0.0), AXIS),)
    if FLAGS & TEACHER:
        v = tl.where(live, teacher, -float("inf"))
        q = tl.max(v, AXIS)
        w = tl.exp2(v - tl.expand_dims(_finite(q), AXIS))
        state = state + (tl.sum(w * tl.where(live, s, 0.0), AXIS), tl.sum(w, AXIS), q)
    elif FLAGS & GAP:
        state = state + (tl.sum(tl.where(live, s, 0.0), AXIS), tl.sum(tl.where(live, 1.0, 0.0), AXIS))
    if FLAGS & INSIDE:
        if hit is not None:
            state = state + _log_sum(tl.where(hit, s, -float("inf")), AXIS)
        else:
            state = state + (tl.where(m == m, -float("inf"), m), l * 0.0)
    return state


@jit
def merge(a, b, FLAGS: tl.constexpr):
    """State of the union of two disjoint sets of scores."""
    T: tl.constexpr = 3 + (FLAGS & FACTOR) // FACTOR
    m = tl.maximum(a[0], b[0])
    wa, wb = tl.exp2(a[0] - _finite(m)), tl.exp2(b[0] - _finite(m))
    state = (m, a[1] * wa + b[1] * wb, a[2] + b[2])
    if FLAGS & FACTOR:
        state = state + (a[3] * wa + b[3] * wb,)
    if FLAGS & TEACHER:
        q = tl.maximum(a[T + 2], b[T + 2])
        va, vb = tl.exp2(a[T + 2] - _finite(q)), tl.exp2(b[T + 2] - _finite(q))
        state = state + (a[T] * va + b[T] * vb, a[T + 1] * va + b[T + 1] * vb, q)
    elif FLAGS & GAP:
        state = state + (a[T] + b[T], a[T + 1] + b[T + 1])
    if FLAGS & (INSIDE | HARDNESS):
        m2 = tl.maximum(a[3], b[3])
        state = state + (m2, a[4] * tl.exp2(a[3] - _finite(m2)) + b[4] * tl.exp2(b[3] - _finite(m2)))
    if FLAGS & HARDNESS:
        state = state + (a[5] + b[5],)
    if FLAGS & HARDEST:
        state = harder(state, a, b, len(state))
    return state


@jit
def settled(state, FLAGS: tl.constexpr):
    """The same state with m within 31 bits of the log-sum, as `shared_gradient` relies on; most are already."""
    k = tl.floor(tl.log2(state[1]))
    k = tl.where((tl.abs(k) > 30.0) & (tl.abs(k) < 200.0), k, 0.0)  # no candidate at all: log2 0
    out = (state[0] + k, state[1] * tl.exp2(-k))
    for f in tl.static_range(2, len(state)):
        out = out + (state[f],)
    return out


@jit
def shared_partial(s, shift, FLAGS: tl.constexpr):
    """States of a tile without targets along both axes from one exponential, and whether they lost nothing."""
    e = tl.exp2(s - shift)
    row, col = tl.sum(e, 1), tl.sum(e, 0)
    kept = True
    if FLAGS & ROWS:
        kept = (tl.min(row, 0) > LOW) & (tl.max(row, 0) < HIGH)
    if FLAGS & COLS:
        kept = kept & (tl.min(col, 0) > LOW) & (tl.max(col, 0) < HIGH)
    return (row * 0.0 + shift, row, row * 0.0), (col * 0.0 + shift, col, col * 0.0), kept


@jit
def _pull(s, hit, teacher, operands, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    # one direction's part of G: the operands already carry cotangent, 1 / l, 1 / targets, 1 / n and the factor
    C: tl.constexpr = 3 + (FLAGS & FACTOR) // FACTOR
    z = s
    if FLAGS & FACTOR:
        z = _scaled(s, operands[3], AXIS)
    g = tl.expand_dims(operands[1], AXIS) * tl.exp2(z - tl.expand_dims(operands[0], AXIS))
    if FLAGS & INSIDE:
        if hit is not None:
            own = tl.expand_dims(operands[4], AXIS) * tl.exp2(s - tl.expand_dims(operands[3], AXIS))
            g = g - tl.where(hit, own, 0.0)
    elif hit is not None:
        g = g - tl.where(hit, tl.expand_dims(operands[2], AXIS), 0.0)
    if FLAGS & TEACHER:
        v = tl.where(s == -float("inf"), s, teacher)
        g = g - tl.expand_dims(operands[C], AXIS) * tl.exp2(v - tl.expand_dims(operands[C + 1], AXIS))
    elif FLAGS & GAP:
        g = g - tl.where(s == -float("inf"), 0.0, tl.expand_dims(operands[C], AXIS))
    return g


@jit
def _pull_negatives(s, hit, operands, beta, AXIS: tl.constexpr):
    # operands: m, (1 + beta) cotangent / l, target coefficient, m2, beta cotangent / l2
    away = s
    if hit is not None:
        away = tl.where(hit, -float("inf"), s)
    g = tl.expand_dims(operands[1], AXIS) * tl.exp2(_times(away, 1.0 + beta) - tl.expand_dims(operands[0], AXIS))
    g = g - tl.expand_dims(operands[4], AXIS) * tl.exp2(_times(away, beta) - tl.expand_dims(operands[3], AXIS))
    if hit is not None:
        g = g - tl.where(hit, tl.expand_dims(operands[2], AXIS), 0.0)
    return g


@jit
def _pull_teacher(s, student, operands, AXIS: tl.constexpr):
    # operands: q, cotangent / n, the student's mean score under the teacher
    share = tl.expand_dims(operands[1], AXIS) * tl.exp2(s - tl.expand_dims(operands[0], AXIS))
    return share * (tl.expand_dims(operands[2], AXIS) - student)


@jit
def _along(s, hit, teacher, operands, beta, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    if FLAGS & SWAPPED:
        g = _pull_teacher(s, teacher, operands, AXIS)
    elif FLAGS & HARDNESS:
        g = _pull_negatives(s, hit, operands, beta, AXIS)
    else:
        g = _pull(s, hit, teacher, operands, AXIS, FLAGS)
    return g


@jit
def gradient(s, to_col, hit, teacher, row, col, beta, FLAGS: tl.constexpr):
    """G = sum of cotangent * d stat / d s, the target subtracted inside the tile (before any rounding of G).

    `s` are the scores as the rows see them and `to_col` as the columns do. `row` and `col` are tuples of vectors: m,
    cotangent / l, target coefficient, and as the options ask the factor, the candidate coefficient, q, m2, the
    coefficient of the targets' softmax.
    """
    if FLAGS & ROWS:
        g = _along(s, hit, teacher, row, beta, 1, FLAGS)
        if FLAGS & COLS:
            g = g + _along(to_col, hit, teacher, col, beta, 0, FLAGS)
    else:
        g = _along(to_col, hit, teacher, col, beta, 0, FLAGS)
    return g


@jit
def shareable(row, col, FLAGS: tl.constexpr):
    """The shift that one exponential for both directions may take in `shared_gradient`, and whether it may."""
    if FLAGS & ROWS:
        low, high = tl.min(row[0], 0), tl.max(row[0], 0)
        if FLAGS & COLS:
            low, high = tl.minimum(low, tl.min(col[0], 0)), tl.maximum(high, tl.max(col[0], 0))
    else:
        low, high = tl.min(col[0], 0), tl.max(col[0], 0)
    return (low + high) * 0.5, high - low < SPREAD


@jit
def shared_gradient(s, shift, row, col, FLAGS: tl.constexpr):
    """G of a tile without targets whose rows and columns have their `m` within `SPREAD` of one another."""
    if FLAGS & ROWS:
        weight = tl.expand_dims(row[1] * tl.exp2(shift - row[0]), 1)
        if FLAGS & COLS:
            weight = weight + tl.expand_dims(col[1] * tl.exp2(shift - col[0]), 0)
    else:
        weight = tl.expand_dims(col[1] * tl.exp2(shift - col[0]), 0)
    return tl.exp2(s - shift) * weight


@jit
def identity(zero, FLAGS: tl.constexpr):
    """State of no scores at all, shaped like `zero`."""
    none = zero - float("inf")
    state = (none, zero, zero)
    if FLAGS & FACTOR:
        state = state + (zero,)
    if FLAGS & GAP:
        state = state + (zero, zero)
    if FLAGS & TEACHER:
        state = state + (none,)
    if FLAGS & (INSIDE | HARDNESS):
        state = state + (none, zero)
    if FLAGS & HARDNESS:
        state = state + (zero,)
    if FLAGS & HARDEST:
        state = state + nobody(zero)
    return state


# what the kernels take: with the cheap way for both directions, and without
FOLD = (identity, partial, merge, shared_partial, settled)
EXACT_FOLD = (identity, partial, merge, None, settled)
PULL = (gradient, None, shareable, shared_gradient)
EXACT_PULL = (gradient, None, None, None)
