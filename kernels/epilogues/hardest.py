"""The hardest negative of a row or column of scores, beside whatever an epilogue folds.

The state is the monoid

    b = max of s over the negatives     a = its index, the lowest of equals     w = max of s over the targets
    c = number of negatives

A negative is a candidate (s above -inf) that is no target. Indices are floats, exact up to 2^24.
"""

from ..lang import jit, tl

NOBODY = tl.constexpr(1.0e9)  # an index beyond all others


@jit
def hardest(s, hit, index, AXIS: tl.constexpr):
    """State of the tile `s` along `AXIS`; `index` are the places along it."""
    away = s
    if hit is not None:
        away = tl.where(hit, -float("inf"), s)
        w = tl.max(tl.where(hit, s, -float("inf")), AXIS)
        b = tl.max(away, AXIS)
    else:
        b = tl.max(away, AXIS)
        w = tl.where(b == b, -float("inf"), b)
    a = tl.min(tl.where(away == tl.expand_dims(b, AXIS), tl.expand_dims(index, 1 - AXIS), NOBODY), AXIS)
    return b, a, w, tl.sum(tl.where(away == -float("inf"), 0.0, 1.0), AXIS)


@jit
def harder(state, x, y, AT: tl.constexpr):
    """`state`, and behind it the union of what the states `x` and `y` hold from field `AT` on."""
    first = (x[AT] > y[AT]) | ((x[AT] == y[AT]) & (x[AT + 1] < y[AT + 1]))
    b, a = tl.maximum(x[AT], y[AT]), tl.where(first, x[AT + 1], y[AT + 1])
    return state + (b, a, tl.maximum(x[AT + 2], y[AT + 2]), x[AT + 3] + y[AT + 3])


@jit
def nobody(zero):
    """State of no scores, shaped like `zero`."""
    none = zero - float("inf")
    return none, zero + NOBODY, none, zero
