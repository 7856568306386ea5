"""Hinges of a score tile over its negatives, in both directions, and their gradient tile.

With scores in bits, s = log2(e) * (scale * <x, y> + bias), and a threshold f of each row (or column) in nats, the
state along an axis is the monoid

    h = sum over the negatives of max(s - log2(e) f, 0)      k = number of those above 0

and with HARDEST the fields of `hardest`. What the engine differentiates is h in nats; its gradient with respect to f
is -k. A score of -inf is not a candidate. See objectives: ranking losses.
"""

from ..lang import LOG2E, jit, tl
from .hardest import harder, hardest, nobody
from .softmax import COLS, HARDEST, ROWS


@jit
def _excess(s, hit, threshold, AXIS: tl.constexpr):
    # how far negatives stand above the threshold; at most 0 for all others
    over = s - tl.expand_dims(threshold * LOG2E, AXIS)
    if hit is not None:
        over = tl.where(hit, 0.0, over)
    return over


@jit
def partial(s, hit, teacher, factor, index, beta, AXIS: tl.constexpr, FLAGS: tl.constexpr):
    """State of the tile `s` along `AXIS`; `factor` are the thresholds."""
    over = _excess(s, hit, factor, AXIS)
    state = (tl.sum(tl.maximum(over, 0.0), AXIS), tl.sum(tl.where(over > 0.0, 1.0, 0.0), AXIS))
    if FLAGS & HARDEST:
        state = state + hardest(s, hit, index, AXIS)
    return state


@jit
def merge(a, b, FLAGS: tl.constexpr):
    """State of the union of two disjoint sets of scores."""
    state = (a[0] + b[0], a[1] + b[1])
    if FLAGS & HARDEST:
        state = harder(state, a, b, 2)
    return state


@jit
def gradient(s, to_col, hit, teacher, row, col, beta, FLAGS: tl.constexpr):
    """G from the operands of rows and columns (threshold, cotangent); columns see the scores as `to_col`."""
    if FLAGS & ROWS:
        g = tl.where(_excess(s, hit, row[0], 1) > 0.0, tl.expand_dims(row[1], 1), 0.0)
        if FLAGS & COLS:
            g = g + tl.where(_excess(to_col, hit, col[0], 0) > 0.0, tl.expand_dims(col[1], 0), 0.0)
    else:
        g = tl.where(_excess(to_col, hit, col[0], 0) > 0.0, tl.expand_dims(col[1], 0), 0.0)
    return g


@jit
def settled(state, FLAGS: tl.constexpr):
    """The state is as its readers want it."""
    return state


@jit
def identity(zero, FLAGS: tl.constexpr):
    """State of no scores at all, shaped like `zero`."""
    state = (zero, zero)
    if FLAGS & HARDEST:
        state = state + nobody(zero)
    return state


FOLD = EXACT_FOLD = (identity, partial, merge, None, settled)
PULL = EXACT_PULL = (gradient, None, None, None)
