"""Anti-aliased drawing of a shapes scene with numpy alone, and the box that each object really shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

RGB = {
    "red": (220, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 215, 30),
    "green": (40, 160, 60),
    "cyan": (40, 200, 215),
    "blue": (40, 75, 215),
    "purple": (125, 50, 165),
    "pink": (250, 135, 190),
}
SUPERSAMPLE = 6  # sub-pixels a side: 37 levels of coverage

Box = tuple[int, int, int, int]


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tip = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # angle to the nearest of five tips
    inner = 0.45  # the edge runs from the tip (radius 1) to the notch (radius `inner`, 36 degrees further)
    edge = (
        inner
        * np.sin(np.pi / 5)
        / (np.sin(tip) * (1 - inner * np.cos(np.pi / 5)) + np.cos(tip) * inner * np.sin(np.pi / 5))
    )
    inside: np.ndarray = np.hypot(x, y) <= edge
    return inside


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = 1.2 * x, 0.15 - 1.15 * y
    return (u * u + v * v - 1) ** 3 <= u * u * v * v * v


# Inside tests on the square [-1, 1]^2, y downwards.
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y <= 0.92,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.82,
    "triangle": lambda x, y: (y <= 0.8) & (1.75 * np.abs(x) <= y + 0.95),
    "diamond": lambda x, y: 1.35 * np.abs(x) + np.abs(y) <= 1,
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 0.95),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) <= 0.24,
    "heart": _heart,
}


@lru_cache(maxsize=1024)
def coverage(shape: str, radius: int) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [2 radius, 2 radius] in [0, 1]."""
    side = 2 * radius
    at = (np.arange(side * SUPERSAMPLE) + 0.5) / (radius * SUPERSAMPLE) - 1
    inside = INSIDE[shape](at[None, :], at[:, None])
    share: np.ndarray = inside.reshape(side, SUPERSAMPLE, side, SUPERSAMPLE).mean((1, 3), dtype=np.float32)
    return share


@lru_cache(maxsize=64)
def background(name: str, size: int) -> np.ndarray:
    """The empty picture, float32 [size, size, 3]."""
    level = {"white": 250.0, "gray": 128.0, "black": 12.0, "striped": 200.0}[name]
    picture = np.full((size, size, 3), level, np.float32)
    if name == "striped":
        picture[np.arange(size) // max(2, size // 16) % 2 == 0] = 160.0
    return picture


def draw(
    size: int, backdrop: str, things: list[tuple[str, tuple[float, float, float], int, int, int]]
) -> tuple[np.ndarray, list[Box]]:
    """Paint ``(shape, rgb, centre x, centre y, radius)`` in order, later ones on top, clipped at the border.

    Returns the picture, uint8 [size, size, 3], and per thing the tight box (x0, y0, x1, y1), half open, of the
    pixels in which some of it is visible: what is hidden or outside does not count.
    """
    picture = background(backdrop, size).copy()
    seen: list[tuple[int, int, np.ndarray]] = []  # left, top and visible coverage of each thing
    for shape, rgb, x, y, radius in things:
        left, top = max(0, x - radius), max(0, y - radius)
        right, bottom = min(size, x + radius), min(size, y + radius)
        alpha = coverage(shape, radius)[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
        patch = picture[top:bottom, left:right]
        patch += alpha[..., None] * (np.asarray(rgb, np.float32) - patch)
        for below_left, below_top, below in seen:
            _hide(below, below_left, below_top, alpha, left, top)
        seen.append((left, top, alpha.copy()))
    return (picture + 0.5).astype(np.uint8), [_tight(*thing) for thing in seen]


def _hide(below: np.ndarray, left: int, top: int, alpha: np.ndarray, over_left: int, over_top: int) -> None:
    """Take from ``below`` (in place) what ``alpha`` covers."""
    x0, y0 = max(left, over_left), max(top, over_top)
    x1 = min(left + below.shape[1], over_left + alpha.shape[1])
    y1 = min(top + below.shape[0], over_top + alpha.shape[0])
    if x0 < x1 and y0 < y1:
        below[y0 - top : y1 - top, x0 - left : x1 - left] *= (
            1 - alpha[y0 - over_top : y1 - over_top, x0 - over_left : x1 - over_left]
        )


def _tight(left: int, top: int, visible: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if not len(rows):
        return left, top, left, top
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
