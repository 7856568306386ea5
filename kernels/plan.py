"""How the GPU backend cuts a problem: strips and parts of the forward grid, macro-tiles of backward. Integers only."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from .configs import Tile

__all__ = ["ceil", "half", "macro_tile", "parts", "round_up", "strips"]


def strips(m: int, blocks: int, rows: int, first: int | None = None) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each launch, of at most `blocks` row blocks: alike, or doubling from `first`."""
    launches = ceil(ceil(m, rows), blocks)
    size = round_up(ceil(m, launches), rows) if first is None else min(first, blocks) * rows
    at = 0
    while at < m:
        yield at, min(size, m - at)
        at += size
        size = size if first is None else min(2 * size, blocks * rows)


@functools.cache
def parts(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """Tiles of columns a program walks over, and programs a row block: what keeps every processor busy to the end."""

    def time(count: int) -> float:  # rounds of programs, each with its tiles and a little of its own
        return ceil(blocks * ceil(tiles, count), processors) * (count + 0.15)

    count = min(range(1, tiles + 1), key=time)
    return count, ceil(tiles, count)


def macro_tile(m: int, n: int, elements: int, tile: Tile) -> tuple[int, int]:
    """Rows and columns of a macro-tile of at most `elements`, near square and alike along each side."""
    side = max(int(elements**0.5) // 256 * 256, 256)
    height = round_up(ceil(m, ceil(m, side)), tile.rows)
    most = max((elements // min(height, round_up(m, 16)) - 16) // tile.cols * tile.cols, tile.cols)
    return height, round_up(ceil(n, ceil(n, most)), tile.cols)


def half(cols: int) -> int:
    """Columns of a tile of G that the gradient kernel writes at a time."""
    return cols // 2 if cols >= 128 else cols


def ceil(a: int, b: int) -> int:
    """How many times `b` it takes to hold `a`."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of `b` that is not below `a`."""
    return ceil(a, b) * b
