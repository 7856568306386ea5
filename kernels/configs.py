"""The tile table: which tile a kernel takes on an architecture, for a dtype, a class of D and a kind of epilogue.

Beside each row stands what justifies it: a measurement, or, as long as there is none, the static report of
`tools/kernel_report.py` (docs/kernels.md has its table). `use` puts another tile in a row's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["TABLE", "Tile", "choose", "shared", "use"]


class Tile(NamedTuple):
    """Rows and columns of a tile of scores, depth of a step, columns of an exact piece, warps and pipeline stages."""

    rows: int
    cols: int
    depth: int
    piece: int
    warps: int
    stages: int


# kind: "plain" shares one exponential between the directions, "one" has one direction, "ids" shares behind a mask,
# "exact" does not share, nor do "beside", which looks at second products, and "heavy", which has two options that
# need registers; "sweep" is a loss that is a plain sum
# (kernel, architecture, dtype or precision, largest D, kind): tile
ANY = 1 << 30
TABLE: dict[tuple[str, int, str, int, str], Tile] = {
    # static report of the main calls: no spills; the largest tiles that fit the registers, cp.async
    ("forward", 80, "half", ANY, "plain"): Tile(128, 128, 32, 64, 8, 3),
    ("gradient", 80, "half", ANY, "plain"): Tile(128, 128, 32, 32, 8, 3),
    ("forward", 80, "half", ANY, "ids"): Tile(128, 128, 32, 32, 8, 3),
    ("gradient", 80, "half", ANY, "ids"): Tile(128, 128, 32, 16, 8, 3),
    ("forward", 80, "half", ANY, "exact"): Tile(64, 64, 32, 64, 8, 3),
    ("gradient", 80, "half", ANY, "exact"): Tile(64, 64, 32, 64, 8, 3),
    ("forward", 80, "half", ANY, "beside"): Tile(32, 64, 32, 64, 8, 3),
    ("gradient", 80, "half", ANY, "sweep"): Tile(128, 128, 32, 32, 8, 3),
    # static report: no spills; wide tiles ask the L2 for 48 bytes a clock instead of 64 (docs/kernels.md, prediction 1)
    ("forward", 90, "half", ANY, "plain"): Tile(128, 256, 64, 64, 8, 3),
    ("gradient", 90, "half", ANY, "plain"): Tile(128, 256, 64, 64, 8, 3),
    ("gradient", 90, "half", ANY, "one"): Tile(128, 128, 64, 64, 8, 3),
    ("forward", 90, "half", ANY, "ids"): Tile(128, 128, 64, 64, 8, 3),
    ("gradient", 90, "half", ANY, "ids"): Tile(128, 128, 64, 32, 8, 3),
    ("forward", 90, "half", ANY, "exact"): Tile(128, 64, 64, 64, 8, 3),
    ("gradient", 90, "half", ANY, "exact"): Tile(128, 64, 64, 64, 8, 3),
    ("forward", 90, "half", ANY, "heavy"): Tile(64, 64, 64, 64, 8, 3),
    ("gradient", 90, "half", ANY, "sweep"): Tile(128, 128, 64, 64, 8, 3),
    # static report: no spills
    ("select", 80, "half", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("select", 80, "half", ANY, "beside"): Tile(32, 32, 32, 32, 8, 3),
    ("select", 90, "half", ANY, "exact"): Tile(64, 64, 64, 64, 8, 3),
    ("select", 90, "half", ANY, "heavy"): Tile(64, 32, 64, 32, 8, 3),
    ("select", 80, "ieee", ANY, "exact"): Tile(32, 32, 32, 32, 4, 2),
    ("select", 80, "tf32", ANY, "exact"): Tile(64, 32, 32, 32, 4, 3),
    ("select", 80, "tf32x3", ANY, "exact"): Tile(64, 32, 32, 32, 4, 3),
    # static report: no spills; what has no row here takes two passes, forward's and the selection's: tf32x3, and
    # "crowded", with three options that need registers or more than 16 places
    ("fused", 80, "half", ANY, "plain"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 80, "half", ANY, "ids"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 80, "half", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 80, "ieee", ANY, "plain"): Tile(32, 32, 32, 32, 8, 2),
    ("fused", 80, "ieee", ANY, "ids"): Tile(32, 32, 32, 32, 8, 2),
    ("fused", 80, "ieee", ANY, "exact"): Tile(32, 32, 32, 32, 8, 2),
    ("fused", 80, "tf32", ANY, "plain"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 80, "tf32", ANY, "ids"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 80, "tf32", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("fused", 90, "half", ANY, "plain"): Tile(64, 64, 64, 64, 8, 3),
    ("fused", 90, "half", ANY, "ids"): Tile(64, 64, 64, 64, 8, 3),
    ("fused", 90, "half", ANY, "exact"): Tile(64, 64, 64, 64, 8, 3),
    ("fused", 90, "half", ANY, "heavy"): Tile(64, 32, 64, 32, 8, 3),
    ("fused", 100, "half", ANY, "exact"): Tile(64, 32, 64, 32, 8, 3),
    # static report: no spills
    ("forward", 100, "half", ANY, "plain"): Tile(128, 128, 64, 64, 8, 3),
    ("gradient", 100, "half", ANY, "plain"): Tile(128, 128, 64, 64, 8, 3),
    ("forward", 100, "half", ANY, "ids"): Tile(128, 128, 64, 64, 8, 3),
    ("gradient", 100, "half", ANY, "ids"): Tile(128, 64, 64, 64, 8, 3),
    ("forward", 100, "half", ANY, "exact"): Tile(64, 32, 64, 32, 8, 3),
    ("gradient", 100, "half", ANY, "exact"): Tile(64, 64, 64, 64, 8, 3),
    ("gradient", 100, "half", ANY, "sweep"): Tile(128, 128, 64, 64, 8, 3),
    ("forward", 100, "ieee", ANY, "ids"): Tile(64, 64, 32, 32, 8, 2),
    # static report: no spills; no tensor cores, fused multiply-adds
    ("forward", 80, "ieee", ANY, "plain"): Tile(64, 64, 32, 64, 8, 2),
    ("gradient", 80, "ieee", ANY, "plain"): Tile(64, 64, 32, 64, 8, 2),
    ("forward", 80, "ieee", ANY, "ids"): Tile(64, 64, 32, 64, 8, 2),
    ("gradient", 80, "ieee", ANY, "ids"): Tile(64, 64, 32, 64, 8, 2),
    ("forward", 80, "ieee", ANY, "exact"): Tile(32, 32, 32, 32, 8, 2),
    ("gradient", 80, "ieee", ANY, "exact"): Tile(32, 32, 32, 32, 8, 2),
    ("gradient", 80, "ieee", ANY, "sweep"): Tile(64, 64, 32, 64, 8, 2),
    # static report: no spills
    ("forward", 80, "tf32", ANY, "plain"): Tile(128, 64, 32, 64, 8, 3),
    ("gradient", 80, "tf32", ANY, "plain"): Tile(128, 64, 32, 64, 8, 3),
    ("forward", 80, "tf32", ANY, "ids"): Tile(128, 64, 32, 64, 8, 3),
    ("gradient", 80, "tf32", ANY, "ids"): Tile(128, 64, 32, 64, 8, 3),
    ("forward", 80, "tf32", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("gradient", 80, "tf32", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("gradient", 80, "tf32", ANY, "sweep"): Tile(128, 64, 32, 64, 8, 3),
    # static report: no spills; each product is three
    ("forward", 80, "tf32x3", ANY, "plain"): Tile(64, 64, 32, 32, 8, 3),
    ("gradient", 80, "tf32x3", ANY, "plain"): Tile(64, 64, 32, 32, 8, 3),
    ("forward", 80, "tf32x3", ANY, "ids"): Tile(64, 32, 32, 32, 8, 3),
    ("gradient", 80, "tf32x3", ANY, "ids"): Tile(64, 32, 32, 32, 8, 3),
    ("forward", 80, "tf32x3", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("gradient", 80, "tf32x3", ANY, "exact"): Tile(64, 32, 32, 32, 8, 3),
    ("gradient", 80, "tf32x3", ANY, "sweep"): Tile(64, 64, 32, 32, 8, 3),
    # static report: no spills
    ("forward", 90, "ieee", ANY, "exact"): Tile(64, 32, 32, 32, 8, 2),
    ("gradient", 90, "ieee", ANY, "exact"): Tile(64, 32, 32, 32, 8, 2),
    ("forward", 90, "tf32", ANY, "exact"): Tile(128, 32, 32, 32, 8, 3),
    ("gradient", 90, "tf32", ANY, "exact"): Tile(128, 32, 32, 32, 8, 3),
    # static report: no spills
    ("forward", 90, "tf32x3", ANY, "plain"): Tile(128, 64, 32, 64, 8, 3),
    ("gradient", 90, "tf32x3", ANY, "plain"): Tile(128, 64, 32, 64, 8, 3),
    ("forward", 90, "tf32x3", ANY, "ids"): Tile(128, 64, 32, 64, 8, 3),
    ("gradient", 90, "tf32x3", ANY, "ids"): Tile(128, 64, 32, 64, 8, 3),
    ("forward", 90, "tf32x3", ANY, "exact"): Tile(128, 32, 32, 32, 8, 3),
    ("gradient", 90, "tf32x3", ANY, "exact"): Tile(128, 32, 32, 32, 8, 3),
    ("gradient", 90, "tf32x3", ANY, "sweep"): Tile(128, 64, 32, 64, 8, 3),
}

# kinds that have rows of their own only where they need them
OTHERWISE = {"one": "plain", "beside": "exact", "heavy": "exact"}
_used: dict[str, Tile | None] = {}


def choose(kernel: str, arch: int, precision: str, d: int, kind: str) -> Tile:
    """The tile of the newest known architecture up to `arch`, with the smallest D class that holds `d`.

    Args:
        kernel: "forward", "gradient", "select", or "fused", which is forward and select in one pass.
        arch: compute capability times ten.
        precision: "half" (bf16, fp16), or how fp32 is multiplied: "ieee", "tf32", "tf32x3".
        d: feature dimension.
        kind: "plain", "one" (else as "plain"), "ids", "exact", "beside" or "heavy" (else as "exact"), "sweep", or
            "crowded", which has no "fused" tile.
    """
    tile = _look_up(kernel, arch, precision, d, kind)
    if tile is None:
        raise ValueError(f"no tile for {kernel}, sm_{arch}, {precision}, D = {d}, {kind}")
    return tile._replace(depth=min(tile.depth, max(16, 1 << (d - 1).bit_length())))


def shared(arch: int, precision: str, d: int, kind: str) -> bool:
    """Whether a loss and the selection beside it share one pass: where the table has a "fused" tile for them."""
    return _look_up("fused", arch, precision, d, kind) is not None


def _look_up(kernel: str, arch: int, precision: str, d: int, kind: str) -> Tile | None:
    if kernel in _used:
        return _used[kernel]
    kinds = kind, OTHERWISE.get(kind)
    rows = [k for k in TABLE if (k[0], k[2]) == (kernel, precision) and k[1] <= arch and d <= k[3] and k[4] in kinds]
    best = min(rows, key=lambda k: (-k[1], k[4] != kind, k[3]), default=None)
    return None if best is None else TABLE[best]


@contextmanager
def use(kernel: str, tile: Tile | None) -> Iterator[None]:
    """Inside the block `kernel` takes this tile, whatever the table says: for tuning and for tests.

    None for "fused" means two passes.
    """
    before = dict(_used)
    _used[kernel] = tile
    try:
        yield
    finally:
        _used.clear()
        _used.update(before)
