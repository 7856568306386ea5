"""The options of a statistic as one number: how they travel through the op boundary and into the kernels.

The epilogues in `kernels/epilogues` have the same names for those that concern a tile's maths, `kernels/scores.py` for
those that concern which entries are candidates.
"""

from __future__ import annotations

__all__ = [
    "COLS", "DETACHED", "FACTOR", "GAP", "GUIDE", "HARDEST", "HARDNESS", "INSIDE", "LIMIT", "MARGIN", "POSITIVE",
    "ROWS", "SWAPPED", "TEACHER",
]  # fmt: skip

ROWS, COLS, GAP, TEACHER, FACTOR, HARDEST = 1, 2, 4, 8, 16, 32
POSITIVE = 128  # equal ids are targets instead of leaving the candidates (64 is the kernels' own: there are ids)
INSIDE, HARDNESS, SWAPPED = 256, 512, 1024
LIMIT, GUIDE, MARGIN = 2048, 4096, 8192
DETACHED = 16384  # of the weights of hard negatives; the kernels need not know
