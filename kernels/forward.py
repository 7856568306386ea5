"""The forward kernel: a block of rows against a range of columns, folded into states; no score leaves the chip.

One program keeps the state of its rows in registers while it walks over the columns, and writes the state that these
rows give to each column. `merge.py` joins the parts: of the columns over the blocks, of the rows over the ranges.

An epilogue may know a cheap way (`shared`, one exponential for both directions about a shift that is kept from tile to
tile). The tiles for which it is not exact, and those on the diagonal, are done again in narrow pieces, so that the
exact way costs no registers of the cheap one.
"""

from .lang import jit, tl
from .layout import product, store_vectors
from .scores import TARGET, columns_of, exact_tile, hardness, numbers, rows_of, scores, targets_within


@jit
def states(to_row, to_col, hit, second, entries, row, col, i, j, partial: tl.constexpr, FLAGS: tl.constexpr):
    """States of one tile, of rows `i` and columns `j`, along both axes, each about its own maximum."""
    beta = hardness(entries, FLAGS)
    in_row = partial(to_row, hit, second, row[3], j.to(tl.float32), beta, 1, FLAGS)
    return in_row, partial(to_col, hit, second, col[3], i.to(tl.float32), beta, 0, FLAGS)


@jit
def _exactly(x, y, tx, ty, entries, m0, n0, M, N, row, partial: tl.constexpr, FLAGS: tl.constexpr, D: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr):  # fmt: skip
    i, j = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    col = columns_of(entries, j, N)
    _, to_row, to_col, hit, second = exact_tile(
        x, y, tx, ty, entries, row, col, m0, n0, M, N, FLAGS, D, BM, BN, BK, LOAD
    )  # fmt: skip
    return states(to_row, to_col, hit, second, entries, row, col, i, j, partial, FLAGS)


@jit(do_not_specialize=["count"])
def forward(X, Y, PIECE, TX, TY, entries, ROW, COL, M, N, first, rows, count, FOLD: tl.constexpr,
            FLAGS: tl.constexpr, D: tl.constexpr, SHAPE: tl.constexpr, LOAD: tl.constexpr):  # fmt: skip
    """Rows `first` to `first + rows` in blocks; each part of the grid takes `count` tiles of columns.

    Writes ROW `[parts, fields, rows]` and COL `[blocks, fields, N]`. `SHAPE` is (rows, columns, depth, columns of a
    piece); Y reads whole tiles, PIECE and TY pieces.
    """
    identity: tl.constexpr = FOLD[0]
    partial: tl.constexpr = FOLD[1]
    merge: tl.constexpr = FOLD[2]
    shared: tl.constexpr = FOLD[3]
    BM: tl.constexpr = SHAPE[0]
    BN: tl.constexpr = SHAPE[1]
    BP: tl.constexpr = SHAPE[3]
    blocks = tl.cdiv(rows, BM)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    m0 = first + block * BM
    i = m0 + tl.arange(0, BM)
    scale, bias, _ = numbers(entries)
    row = rows_of(entries, i, M, bias)
    state = identity(tl.zeros((BM,), tl.float32), FLAGS)
    at_block = block.to(tl.int64) * len(state) * N
    shift = 0.0
    for tile in range(part * count, tl.minimum((part + 1) * count, tl.cdiv(N, BN))):
        n0 = tile * BN
        held = targets_within(row[1], entries[TARGET] is None, m0, n0, BM, BN)
        exact = held
        if shared is None:
            exact = True
        elif not held:
            col = columns_of(entries, n0 + tl.arange(0, BN), N)
            s = scores(product(X, Y, m0, n0, M, N, D[0], BM, BN, SHAPE[2], LOAD), scale, row, col, FLAGS)
            to_row, to_col, kept = shared(s, shift, FLAGS)
            exact = not kept
            if kept:
                state = merge(state, to_row, FLAGS)
                if COL is not None:
                    store_vectors(COL, at_block, N, col[0], col[1], to_col)
        if exact:
            top = -float("inf")
            for piece in range(BN // BP):
                p0 = n0 + piece * BP
                in_row, in_col = _exactly(
                    X, PIECE, TX, TY, entries, m0, p0, M, N, row, partial, FLAGS, D, BM, BP, SHAPE[2], LOAD
                )
                j = p0 + tl.arange(0, BP)
                state = merge(state, in_row, FLAGS)
                if COL is not None:
                    store_vectors(COL, at_block, N, j, j < N, in_col)
                top = tl.maximum(top, tl.max(in_row[0], 0))
            if shared is not None and (not held) & (top > -float("inf")):
                shift = top - 80.0  # room above for larger ones, and 120 bits below
    if ROW is not None:
        store_vectors(ROW, part.to(tl.int64) * len(state) * rows, rows, i - first, i < M, state)
