"""Softmax statistics of a score tile, in both directions, and their gradient tile.

Along an axis the state of a set of scores is the monoid `(m, l, p)`, with `GAP` also `(t, n)`:

    m = max s      l = sum exp(s - m)      p = sum of the scores that are targets      t = sum s      n = count

`partial` makes it from a tile and `merge` joins two, for tiles, chunks, threads and ranks alike. A score of -inf
is not a candidate: it leaves every field as it is. What the engine differentiates is

    nll = (m - p / targets) + log l          gap = p / targets - t / n

so that label smoothing is `nll + eps * gap`. See objectives: InfoNCE, "Precision rules".
"""

from ..lang import jit, tl


@jit
def _finite(m):
    # a max of -inf (no candidate) must not turn -inf - (-inf) into NaN
    return tl.where(m == -float("inf"), 0.0, m)


@jit
def partial(s, hit, AXIS: tl.constexpr, GAP: tl.constexpr):
    """State of the tile `s` along `AXIS` (1: a row's columns, 0: a column's rows); `hit` marks targets, or None."""
    m = tl.max(s, AXIS)
    l = tl.sum(tl.exp(s - tl.expand_dims(_finite(m), AXIS)), AXIS)  # noqa: E741
    if hit is not None:
        p = tl.sum(tl.where(hit, s, 0.0), AXIS)
    else:
        p = l * 0.0
    if GAP:
        live = s != -float("inf")
        t = tl.sum(tl.where(live, s, 0.0), AXIS)
        n = tl.sum(tl.where(live, 1.0, 0.0), AXIS)
        state = (m, l, p, t, n)
    else:
        state = (m, l, p)
    return state


@jit
def merge(a, b, GAP: tl.constexpr):
    """State of the union of two disjoint sets of scores."""
    m = tl.maximum(a[0], b[0])
    shift = _finite(m)
    l = a[1] * tl.exp(a[0] - shift) + b[1] * tl.exp(b[0] - shift)  # noqa: E741
    if GAP:
        state = (m, l, a[2] + b[2], a[3] + b[3], a[4] + b[4])
    else:
        state = (m, l, a[2] + b[2])
    return state


@jit
def _soft(s, operands, AXIS: tl.constexpr):
    # cotangent times probability: the operand already carries 1 / l
    return tl.expand_dims(operands[1], AXIS) * tl.exp(s - tl.expand_dims(operands[0], AXIS))


@jit
def gradient(s, hit, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, GAP: tl.constexpr):
    """G = sum of cotangent * d stat / d s, the target subtracted inside the tile (before any rounding of G).

    `row` and `col` are tuples of vectors: m, cotangent / l, target coefficient and, with `GAP`, candidate coefficient.
    """
    if ROWS:
        g = _soft(s, row, 1)
        if COLS:
            g = g + _soft(s, col, 0)
    else:
        g = _soft(s, col, 0)
    if hit is not None:
        if ROWS:
            g = g - tl.where(hit, tl.expand_dims(row[2], 1), 0.0)
        if COLS:
            g = g - tl.where(hit, tl.expand_dims(col[2], 0), 0.0)
    if GAP:
        live = s != -float("inf")
        if ROWS:
            g = g - tl.where(live, tl.expand_dims(row[3], 1), 0.0)
        if COLS:
            g = g - tl.where(live, tl.expand_dims(col[3], 0), 0.0)
    return g
