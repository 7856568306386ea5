"""The selection kernel: the k best candidates of a block of rows, kept in registers while it walks over the columns.

The law and the order of candidates are those of `scores/selection.py`. Of a tile only the best key of each row and
column is looked at, against the last place so far; a tile whose best does not reach it costs no more. Otherwise the
best are taken out one by one. A column's places begin at what earlier launches found (`LEAST`), and go to memory, a
part for every block of rows; the library's top-k joins the parts.

Beside a loss the same tile is also folded into the loss's states, the exact way of the forward kernel.
"""

from .epilogues.topk import drained, key_of, keys, words
from .forward import states
from .lang import jit, tl
from .layout import store_vectors, vector
from .scores import columns_of, exact_tile, numbers, rows_of


@jit
def _places(count: tl.constexpr, K: tl.constexpr):
    """`count` rows of K places that nobody has; each another number, so that one can be told from the next."""
    nobody = tl.full((count, K), -(2**63), tl.int64) + tl.arange(0, K)[None, :].to(tl.int64)
    return nobody, tl.zeros((count, K), tl.float32)


@jit
def _store(ORDER, BEST, first, i, inside, state, K: tl.constexpr):
    """Write the places of the rows `i` of `[.., K]` from row `first` on."""
    at = (first + i).to(tl.int64)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(ORDER + at, state[0], mask=inside[:, None])
    tl.store(BEST + at, state[1], mask=inside[:, None])


@jit(do_not_specialize=["count"])
def select(X, Y, TX, TY, entries, LAW, ROW_TOTAL, COL_TOTAL, PLACE, LEAST, ROW, COL, M, N, first, rows, count,
           HOW: tl.constexpr, FOLD: tl.constexpr, FLAGS: tl.constexpr, D: tl.constexpr, SHAPE: tl.constexpr,
           LOAD: tl.constexpr):  # fmt: skip
    """Rows `first` to `first + rows` in blocks; each part of the grid takes `count` tiles of columns.

    ROW and COL are (order, product, state), of which the first two are `[parts, rows, K]` and `[blocks, N, K]`, or None
    for a direction not asked; LEAST `[N]` is the place that a column's candidate must reach. `HOW` is (K, whether there
    is noise, whether a floor). `FOLD` makes the states, as in forward; with None there are none.
    """
    K: tl.constexpr = HOW[0]
    BM: tl.constexpr = SHAPE[0]
    BN: tl.constexpr = SHAPE[1]
    blocks = tl.cdiv(rows, BM)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    m0 = first + block * BM
    i = m0 + tl.arange(0, BM)
    row = rows_of(entries, i, M, numbers(entries)[1])
    law = (tl.load(LAW), tl.load(LAW + 1))
    row_total = vector(ROW_TOTAL, i, i < M, 0.0)
    first_row, first_col = tl.load(PLACE + 2), tl.load(PLACE + 3)
    order, best = _places(BM, K)
    if FOLD is not None:
        identity: tl.constexpr = FOLD[0]
        partial: tl.constexpr = FOLD[1]
        merge: tl.constexpr = FOLD[2]
        state = identity(tl.zeros((BM,), tl.float32), FLAGS)
    for tile in range(part * count, tl.minimum((part + 1) * count, tl.cdiv(N, BN))):
        n0 = tile * BN
        j = n0 + tl.arange(0, BN)
        col = columns_of(entries, j, N)
        acc, to_row, to_col, hit, second = exact_tile(
            X, Y, TX, TY, entries, row, col, m0, n0, M, N, FLAGS, D, BM, BN, SHAPE[2], LOAD
        )  # fmt: skip
        if FOLD is not None:
            to_rows, to_cols = states(to_row, to_col, hit, second, entries, row, col, i, j, partial, FLAGS)
            state = merge(state, to_rows, FLAGS)
            if COL is not None:
                store_vectors(COL[2], block.to(tl.int64) * len(to_cols) * N, N, j, j < N, to_cols)
        in_row, in_col = 0.0, 0.0
        if HOW[1]:
            in_row, in_col = words(PLACE, first_row + i, first_col + j)
        if ROW is not None:
            key = keys(acc, to_row, hit, law, row_total, in_row, 1, HOW)
            order, best = drained(key, acc, order, best, j, first_col, 1)
        if COL is not None:
            key = keys(acc, to_col, hit, law, vector(COL_TOTAL, j, j < N, 0.0), in_col, 0, HOW)
            places, products = _places(BN, K)
            # what earlier launches found fills the last place, and is not theirs to write
            least = tl.load(LEAST + j, mask=j < N, other=-(2**63))
            places, products = drained(tl.where(key >= key_of(least)[None, :], key, -float("inf")), acc, places,
                                       products, i, first_row, 0)  # fmt: skip
            _store(COL[0], COL[1], block.to(tl.int64) * N, j, j < N, (places, products), K)
    if ROW is not None:
        _store(ROW[0], ROW[1], part.to(tl.int64) * rows - first, i, i < M, (order, best), K)
        if FOLD is not None:
            store_vectors(ROW[2], part.to(tl.int64) * len(state) * rows, rows, i - first, i < M, state)
