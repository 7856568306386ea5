"""The gradient kernel: one tile of scores is made again and becomes a tile of G = d loss / d scores in the workspace.

G is in units that its reader knows (|G| is about 1), in the dtype of the features: two library products turn it into
the features' gradients. Each program also leaves the sums that the scale and the biases need, before any rounding.
"""

from .lang import jit, tl
from .layout import part, product, store_tile, store_vectors, vectors
from .scores import TARGET, columns_of, exact_tile, hardness, numbers, rows_of, scores, targets_within


@jit
def _exactly(x, y, tx, ty, entries, m0, n0, M, N, row, at_row, at_col, PULL: tl.constexpr, FLAGS: tl.constexpr,
             D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOAD: tl.constexpr):  # fmt: skip
    """The tile of G, every exponential about its own reference, and its sums."""
    pull: tl.constexpr = PULL[0]
    col = columns_of(entries, n0 + tl.arange(0, BN), N)
    acc, s, to_col, hit, second = exact_tile(
        x, y, tx, ty, entries, row, col, m0, n0, M, N, FLAGS, D, BM, BN, BK, LOAD
    )  # fmt: skip
    g = pull(s, to_col, hit, second, at_row, at_col, hardness(entries, FLAGS), FLAGS)
    return g, _sums(s, acc, g, hit, at_row, at_col, PULL, FLAGS)


@jit
def _sums(s, acc, g, hit, at_row, at_col, PULL: tl.constexpr, FLAGS: tl.constexpr):
    """Sum of G c over the tile, with c = <x, y>; that of G where it is not 0; and of a plain sum its own."""
    value: tl.constexpr = PULL[1]
    g_sum, total = 0.0, 0.0
    if PULL[5]:
        g_sum = tl.sum(g)
    if value is not None:
        total = tl.sum(value(s, hit, at_row, at_col, FLAGS))
    return tl.sum(g * acc), g_sum, total


@jit
def gradient(X, Y, PIECE, TX, TY, entries, ROW, COL, OUT, OUT_PIECE, SUMS, COL_SUMS, place, PULL: tl.constexpr,
             FLAGS: tl.constexpr, D: tl.constexpr, SHAPE: tl.constexpr, LOAD: tl.constexpr):  # fmt: skip
    """The tile of G at `program_id` of a macro-tile, its sums `SUMS[3, programs]` and `COL_SUMS[blocks, columns]`.

    Of these outputs each may be None.

    `place` is (M, N, first row, first column, rows, columns, stride in the workspace) of the macro-tile; ROW and COL
    hold the epilogue's operands `[OPERANDS, M]` and `[OPERANDS, N]`, `PULL` is (gradient, value, shareable, shared,
    OPERANDS, whether the sum of G is wanted).
    """
    BM: tl.constexpr = SHAPE[0]
    BN: tl.constexpr = SHAPE[1]
    BP: tl.constexpr = SHAPE[3]
    BH: tl.constexpr = BN // 2 if BN >= 128 else BN  # a wide tile is read off by halves, for the registers
    shareable: tl.constexpr = PULL[2]
    shared: tl.constexpr = PULL[3]
    M, N, rows, cols, stride = place[0], place[1], place[4], place[5], place[6]
    # eight row blocks walk over the columns together, so that what they read is still in the cache
    blocks, tiles = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    group = tl.program_id(0) // (8 * tiles)
    height = tl.minimum(blocks - group * 8, 8)
    block = group * 8 + tl.program_id(0) % (8 * tiles) % height
    tile = tl.program_id(0) % (8 * tiles) // height
    m0, n0 = place[2] + block * BM, place[3] + tile * BN
    i, j = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    scale, bias, _ = numbers(entries)
    row = rows_of(entries, i, M, bias)
    at_row = vectors(ROW, 0, M, i, i < M, PULL[4])
    gc, g_sum, total = 0.0, 0.0, 0.0
    exact = True
    if shared is not None:
        at_col = vectors(COL, 0, N, j, j < N, PULL[4])
        shift, may = shareable(at_row, at_col, FLAGS)
        exact = (not may) | targets_within(row[1], entries[TARGET] is None, m0, n0, BM, BN)
        if not exact:
            acc = product(X, Y, m0, n0, M, N, D[0], BM, BN, SHAPE[2], LOAD)
            for k in tl.static_range(BN // BH):
                jh = n0 + k * BH + tl.arange(0, BH)
                half = part(acc, k, BH)
                at_half = vectors(COL, 0, N, jh, jh < N, PULL[4])
                s = scores(half, scale, row, columns_of(entries, jh, N), FLAGS)
                g = shared(s, shift, at_row, at_half, FLAGS)
                if SUMS is not None:
                    sums = _sums(s, half, g, None, at_row, at_half, PULL, FLAGS)
                    gc, g_sum, total = gc + sums[0], g_sum + sums[1], total + sums[2]
                if COL_SUMS is not None:
                    at = tile * BN + k * BH + tl.arange(0, BH)
                    store_vectors(COL_SUMS, block.to(tl.int64) * cols, 0, at, at < cols, (tl.sum(g, 0),))
                if OUT is not None:
                    store_tile(OUT, block * BM, tile * BN + k * BH, rows, cols, stride, g, LOAD)
    if exact:
        for piece in range(BN // BP):
            p0 = n0 + piece * BP
            jp = p0 + tl.arange(0, BP)
            tile_g, of_piece = _exactly(
                X, PIECE, TX, TY, entries, m0, p0, M, N, row, at_row, vectors(COL, 0, N, jp, jp < N, PULL[4]),
                PULL, FLAGS, D, BM, BP, SHAPE[2], LOAD,
            )  # fmt: skip
            if COL_SUMS is not None:
                at = tile * BN + piece * BP + tl.arange(0, BP)
                store_vectors(COL_SUMS, block.to(tl.int64) * cols, 0, at, at < cols, (tl.sum(tile_g, 0),))
            if OUT is not None:
                store_tile(OUT_PIECE, block * BM, tile * BN + piece * BP, rows, cols, stride, tile_g, LOAD)
            gc, g_sum, total = gc + of_piece[0], g_sum + of_piece[1], total + of_piece[2]
    if SUMS is not None:
        store_vectors(SUMS, 0, tl.num_programs(0), tl.program_id(0), None, (gc, g_sum, total))
