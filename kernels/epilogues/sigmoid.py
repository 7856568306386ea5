"""The sigmoid loss of a score tile and its gradient tile, made together in one sweep.

With scores in bits, s = log2(e) * (scale * <x, y> + bias), a row weight w, a column weight v and y = 1 at targets,

    loss = sum w v (log2(1 + 2^s) - y s)      in bits          G = w v (1 / (1 + 2^-s) - y)

No row or column statistics are needed, so the scores are made once: 6 M N D operations instead of 8.
A score of -inf is not a candidate: no loss and no gradient. See objectives: SigLIP.
"""

from ..lang import jit, tl

SMALL = tl.constexpr(0.0625)


@jit
def _log2_1p(e):
    # log2(1 + e) loses every digit of a small e; beyond SMALL the series' six terms are exact to rounding
    series = e * (1 + e * (-1 / 2 + e * (1 / 3 + e * (-1 / 4 + e * (1 / 5 + e * (-1 / 6))))))
    return tl.where(e < SMALL, series * 1.4426950408889634, tl.log2(1 + e))


@jit
def value(s, hit, row, col, FLAGS: tl.constexpr):
    """Weighted loss of every entry, in bits; `row` and `col` are the tuples of their weights."""
    loss = tl.maximum(s, 0.0) + _log2_1p(tl.exp2(-tl.abs(s)))
    if hit is not None:
        loss = loss - tl.where(hit, s, 0.0)
    return loss * (tl.expand_dims(row[0], 1) * tl.expand_dims(col[0], 0))


@jit
def gradient(s, hit, teacher, row, col, FLAGS: tl.constexpr):
    """G = d loss / d score."""
    e = tl.exp2(-tl.abs(s))
    small = e / (1 + e)  # sigmoid of -|s|
    if hit is not None:
        # 1 - sigmoid(s) = sigmoid(-s): never the difference of two numbers near 1
        g = tl.where(hit, tl.where(s < 0.0, small - 1, -small), tl.where(s < 0.0, small, 1 - small))
    else:
        g = tl.where(s < 0.0, small, 1 - small)
    return g * (tl.expand_dims(row[0], 1) * tl.expand_dims(col[0], 0))


@jit
def shareable(row, col, FLAGS: tl.constexpr):
    """Every tile without targets may take `shared_gradient`; there is no shift to choose."""
    return 0.0, True


@jit
def shared_gradient(s, shift, row, col, FLAGS: tl.constexpr):
    """`gradient` of a tile without targets."""
    return gradient(s, None, None, row, col, FLAGS)


FOLD = EXACT_FOLD = None
PULL = (gradient, value, shareable, shared_gradient)
EXACT_PULL = (gradient, value, None, None)
