"""One door to every source of pairs: ``shapes``, ``emoji``, or a path of your own."""

from __future__ import annotations

from pathlib import Path

from . import emoji, files, shapes
from .npm import FetchError
from .pairs import Splits


def load(data: str, size: int = 48, seed: int = 0) -> Splits:
    """Training and test pairs at ``size`` x ``size`` pixels.

    ``emoji`` falls back to the embedded shapes where it cannot be fetched; the note then starts with one sentence
    that says why. Raises ValueError for a path that is missing, of another kind, or without usable pairs.
    """
    if data == "shapes":
        return shapes.load(size=size, seed=seed)
    if data != "emoji":
        return files.load(Path(data), size=size)
    try:
        return emoji.load(size=size)
    except FetchError as error:
        embedded = shapes.load(size=size, seed=seed)
        note = f"The emoji set is not available: {error}; using the embedded shapes instead. {embedded.note}"
        return Splits(embedded.train, embedded.test, note)
