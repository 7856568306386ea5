"""The sigmoid loss of a score tile and its gradient tile, made together in one sweep.

With scores in bits, s = log2(e) * (scale * <x, y> + bias), a row weight w, a column weight v (both 1 without FACTOR)
and y = 1 at targets,

    loss = sum w v (log2(1 + 2^s) - y s)      in bits          G = w v (1 / (1 + 2^-s) - y)

No row or column statistics are needed, so the scores are made once: 6 M N D operations instead of 8.
A score of -inf is not a candidate: no loss and no gradient. See objectives: SigLIP.
"""

from ..lang import jit, log2_1p, tl

FACTOR = tl.constexpr(16)


@jit
def _weighted(tile, row, col, FLAGS: tl.constexpr):
    if FLAGS & FACTOR:
        tile = tile * tl.expand_dims(row[0], 1) * tl.expand_dims(col[0], 0)
    return tile


@jit
def value(s, hit, row, col, FLAGS: tl.constexpr):
    """Weighted loss of every entry, in bits; `row` and `col` are the tuples of their weights."""
    z = s
    if hit is not None:
        z = tl.where(hit, -s, s)  # softplus(s) - s = softplus(-s), which does not cancel
    return _weighted(tl.maximum(z, 0.0) + log2_1p(tl.exp2(-tl.abs(s))), row, col, FLAGS)


@jit
def gradient(s, to_col, hit, teacher, row, col, beta, FLAGS: tl.constexpr):
    """G = d loss / d score."""
    e = tl.exp2(-tl.abs(s))
    r = 1 / (1 + e)
    g = tl.where(s < 0.0, e * r, r)
    if hit is not None:
        # sigmoid(s) - 1 = -sigmoid(-s): never the difference of two numbers near 1
        g = tl.where(hit, -tl.where(s < 0.0, r, e * r), g)
    return _weighted(g, row, col, FLAGS)


@jit
def shareable(row, col, FLAGS: tl.constexpr):
    """Every tile without targets may take `shared_gradient`; there is no shift to choose."""
    return 0.0, True


@jit
def shared_gradient(s, shift, row, col, FLAGS: tl.constexpr):
    """`gradient` of a tile without targets."""
    return gradient(s, s, None, None, row, col, 0.0, FLAGS)


FOLD = EXACT_FOLD = None
PULL = (gradient, value, shareable, shared_gradient)
EXACT_PULL = (gradient, value, None, None)
