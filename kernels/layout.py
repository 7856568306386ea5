"""Where things lie in memory: the only kernels' file with pointer arithmetic.

Features are `[rows, D]` without gaps, each row a multiple of 16 bytes, behind a TMA descriptor or a pointer; vectors
are packed as `[count, length]`. Offsets are 64-bit.
"""

from .lang import jit, tl


@jit
def product(x, y, m0, n0, M, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            LOAD: tl.constexpr):  # fmt: skip
    """The tile of x y^T at row m0 and column n0, fp32. What lies beyond the edges is finite and must be masked.

    `LOAD` is (whether x and y are TMA descriptors, precision of fp32).
    """
    acc = tl.zeros((BM, BN), tl.float32)
    # D is a constexpr because Hopper's products lose their overlap in a loop that may run zero times
    if LOAD[0]:
        for k in range(0, tl.cdiv(D, BK)):
            acc = tl.dot(x.load([m0, k * BK]), y.load([n0, k * BK]).T, acc, input_precision=LOAD[1])
    else:
        d = tl.arange(0, BK)
        # rows beyond the edge repeat the last one: a mask over rows would cost the loads their width
        p_x = x + tl.minimum(m0 + tl.arange(0, BM), M - 1).to(tl.int64)[:, None] * D + d[None, :]
        p_y = y + tl.minimum(n0 + tl.arange(0, BN), N - 1).to(tl.int64)[:, None] * D + d[None, :]
        for k in range(0, tl.cdiv(D, BK)):
            if D % BK == 0:
                a, b = tl.load(p_x), tl.load(p_y)
            else:
                inside = (d < D - k * BK)[None, :]
                a, b = tl.load(p_x, mask=inside, other=0.0), tl.load(p_y, mask=inside, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=LOAD[1])
            p_x += BK
            p_y += BK
    return acc


@jit
def part(tile, k: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `k * WIDTH` to `(k + 1) * WIDTH` of a tile that is as wide, or twice."""
    if tile.shape[1] == WIDTH:
        out = tile
    else:
        first, second = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, WIDTH)), (0, 2, 1)))
        if k == 0:
            out = first
        else:
            out = second
    return out


@jit
def number(pointer, otherwise):
    """A scalar in memory, or `otherwise` where there is none."""
    if pointer is not None:
        value = tl.load(pointer)
    else:
        value = otherwise
    return value


@jit
def vector(pointer, at, inside, otherwise):
    """The elements `at`, `otherwise` where not `inside`; a lone `otherwise` where there is no vector."""
    if pointer is not None:
        value = tl.load(pointer + at, mask=inside, other=otherwise)
    else:
        value = otherwise  # not None, of which Triton 3.6 makes no tuple
    return value


@jit
def vectors(pointer, first, stride, at, inside, COUNT: tl.constexpr):
    """The elements `at` of `COUNT` packed vectors from `pointer[first]` on, 0 where not `inside`; none from None."""
    values = ()
    if pointer is not None:
        for k in tl.static_range(COUNT):
            values = values + (tl.load(pointer + first + k * tl.cast(stride, tl.int64) + at, mask=inside, other=0.0),)
    return values


@jit
def store_vectors(pointer, first, stride, at, inside, values):
    """Write a tuple of vectors to where `vectors` finds them."""
    for k in tl.static_range(len(values)):
        tl.store(pointer + first + k * tl.cast(stride, tl.int64) + at, values[k], mask=inside)


@jit
def store_tile(out, m0, n0, rows, cols, stride, tile, LOAD: tl.constexpr):
    """Write a tile into the `[rows, cols]` matrix of the workspace, whose rows are `stride` apart."""
    if LOAD[0]:
        out.store([m0, n0], tile.to(out.dtype))
    else:
        i, j = m0 + tl.arange(0, tile.shape[0]), n0 + tl.arange(0, tile.shape[1])
        at = i.to(tl.int64)[:, None] * stride + j[None, :]
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols)[None, :])
