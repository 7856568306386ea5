"""The k best entries of a tile along an axis: keys, and the places they take.

A place is one int64, the bits of the key made monotonic above those of (2^32 - 1 - index), as in `scores/selection.py`.
Places that nobody has are the lowest numbers of all, each another one.
"""

from ..lang import jit, tl

EMPTY = tl.constexpr(-(2**63) + 64)  # numbers below this are nobody's


@jit
def words(PLACE, i, j):
    """The random words of the entries (i, j) for their rows and for their columns, as Gumbel numbers."""
    seed, step = tl.load(PLACE), tl.load(PLACE + 1)
    shape = (i[:, None] + j[None, :]) * 0
    a, b = (shape + j[None, :]).to(tl.uint32), (shape + (i >> 1)[:, None]).to(tl.uint32)
    low, high = (shape + step).to(tl.uint32), (shape + (step >> 32)).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, a, b, low, high)
    odd = (i & 1 == 1)[:, None]
    return gumbel(tl.where(odd, third, first)), gumbel(tl.where(odd, fourth, second))


@jit
def gumbel(word):
    """Standard Gumbel numbers -log(-log1p(-v)); the logarithm of 1 - v to every digit, by the error of 1 - v."""
    v = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 1.0 - 5.9604644775390625e-08)
    u = 1.0 - v
    e = tl.where(u == 1.0, v, tl.log(u) * v / tl.where(u == 1.0, 1.0, u - 1.0))
    return -tl.log(e)


@jit
def keys(acc, s, hit, law, total, noise, AXIS: tl.constexpr, HOW: tl.constexpr):
    """Keys of a tile of products, -inf for targets, what is not finite, and no candidates by their score `s`."""
    key = acc * law[0]
    if HOW[2]:
        a, b = key - tl.expand_dims(total, AXIS), tl.log(law[1])
        key = tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))  # which does not overflow
    if HOW[1]:
        key = key + noise
    finite = (tl.abs(key) < float("inf")) & (tl.abs(acc) < float("inf"))
    return tl.where((s > -float("inf")) & (hit == 0) & finite, key + 0.0, -float("inf"))


@jit
def key_of(order):
    """The key of a place, -inf of nobody's."""
    monotonic = (order >> 32).to(tl.int32)
    key = (monotonic ^ ((monotonic >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(order < EMPTY, -float("inf"), key)


@jit
def place_of(key, index):
    """The place of a candidate."""
    bits = key.to(tl.int32, bitcast=True)
    monotonic = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (monotonic << 32) | (4294967295 - index.to(tl.int64))


@jit
def drained(key, acc, order, best, index, first, AXIS: tl.constexpr):
    """The places `[.., K]` and their products after a tile, whose indices along `AXIS` are `first + index`."""
    top = tl.max(key, AXIS)
    least = tl.min(order, 1)
    going = tl.max(((top > -float("inf")) & (top >= key_of(least))).to(tl.int32), 0) > 0
    at = tl.expand_dims(index, 1 - AXIS)
    while going:
        chosen = tl.min(tl.where(key == tl.expand_dims(top, AXIS), at, 2147483647), AXIS)  # the lowest of equals
        taken = at == tl.expand_dims(chosen, AXIS)
        product = tl.sum(tl.where(taken, acc, 0.0), AXIS)
        place = place_of(top, first + chosen)
        new = ((top > -float("inf")) & (place > least))[:, None] & (order == least[:, None])
        order, best = tl.where(new, place[:, None], order), tl.where(new, product[:, None], best)
        key = tl.where(taken, -float("inf"), key)
        top, least = tl.max(key, AXIS), tl.min(order, 1)
        going = tl.max(((top > -float("inf")) & (top >= key_of(least))).to(tl.int32), 0) > 0
    return order, best
