"""The merge kernel: parts of states, one after another in a fixed order, into one state per row or column."""

from .lang import jit, tl
from .layout import store_vectors, vectors


@jit(do_not_specialize=["count"])
def merge(PARTS, STATE, count, length, stride, FOLD: tl.constexpr, FLAGS: tl.constexpr, ONTO: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """PARTS `[count, fields, length]` into STATE, whose fields are `stride` apart; onto what is there, or anew."""
    identity: tl.constexpr = FOLD[0]
    join: tl.constexpr = FOLD[2]
    settled: tl.constexpr = FOLD[4]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    state = identity(tl.zeros((BLOCK,), tl.float32), FLAGS)
    FIELDS: tl.constexpr = len(state)
    if ONTO:
        state = vectors(STATE, 0, stride, at, inside, FIELDS)
    step = FIELDS * tl.cast(length, tl.int64)
    for k in range(count // 8):
        for u in tl.static_range(8):  # eight parts on their way at a time
            state = join(state, vectors(PARTS, (k * 8 + u) * step, length, at, inside, FIELDS), FLAGS)
    for k in range(count // 8 * 8, count):
        state = join(state, vectors(PARTS, k * step, length, at, inside, FIELDS), FLAGS)
    store_vectors(STATE, 0, stride, at, inside, settled(state, FLAGS))
