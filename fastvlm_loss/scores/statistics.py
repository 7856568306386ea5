"""What can be asked of a score matrix: an epilogue, its state per row and column, and the monoid merge of states."""

from __future__ import annotations

from typing import Any

from .candidates import Candidates
from .hinge import Hinge
from .sigmoid import Sigmoid, gradient_dtype
from .softmax import Softmax
from .statistic import LN2

__all__ = ["LN2", "Candidates", "Hinge", "Sigmoid", "Softmax", "decode", "gradient_dtype"]

_NAMED: dict[str, Any] = {kind.name: kind for kind in (Softmax, Hinge, Candidates)}


def decode(name: str, flags: int) -> Softmax | Hinge:
    """The statistic that `name` and `flags` stand for at the op boundary, `Candidates` for a selection alone."""
    if name not in _NAMED:
        raise ValueError(f"epilogue: got {name!r} with flags {flags}, wanted one of {', '.join(_NAMED)}")
    found: Softmax | Hinge = _NAMED[name].of(flags)
    return found
