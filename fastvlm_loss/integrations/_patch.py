"""What an integration replaced in another package, and the way back."""

from __future__ import annotations

from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["Patch"]

_MISSING = object()
# of a value whose patch is undone while a later one stands on it: what the attribute was before
_BEFORE: WeakKeyDictionary[Any, object] = WeakKeyDictionary()


class Patch:
    """Attributes set on modules, classes or instances, which `undo` or the end of a `with` block puts back.

    Patches of the same attribute nest, and may be undone in any order: one that is undone while a later one stands on
    it leaves the attribute to that, which puts back what was there before both.
    """

    def __init__(self) -> None:
        # what each attribute was in the owner's own namespace, and what it is now
        self._replaced: list[tuple[object, str, object, object]] = []
        self._undone = False

    def set(self, owner: object, name: str, value: object) -> None:
        """Set an attribute and remember what the owner itself had there, if anything."""
        old = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._replaced.append((owner, name, old, value))

    def undo(self) -> None:
        """Put every attribute back as it was, the last first; again does nothing."""
        self._undone = True
        while self._replaced:
            owner, name, old, new = self._replaced.pop()
            while old in _BEFORE:
                old = _BEFORE[old]
            if vars(owner).get(name, _MISSING) is not new:
                _BEFORE[new] = old
            elif old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

    def __enter__(self) -> Patch:
        """Itself, which the end of the block undoes.

        Raises:
            RuntimeError: it was undone before, and would patch nothing.
        """
        if self._undone:
            raise RuntimeError("patch: got one that was undone, wanted a new one for this block")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
