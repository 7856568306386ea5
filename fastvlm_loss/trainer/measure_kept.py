"""What autograd keeps between forward and backward, in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Kept"]


class Kept:
    """Bytes that autograd keeps for backward, at their highest; storages that are given are not counted.

    A storage counts once, from the first tensor that is saved of it to the last that is freed. Under checkpointing
    those of a layer are saved in backward, one layer at a time, by checkpointing itself: what is counted there is what
    it keeps between the passes.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        self.others = {t.untyped_storage().data_ptr() for t in others}
        self.uses: dict[int, int] = {}
        self.now: Counter[torch.dtype] = Counter()
        self.highest: Counter[torch.dtype] = Counter()  # by the type of the numbers

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda s: s.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.hooks.__exit__(*raised)

    def add(self, tensor: Tensor) -> None:
        """It is saved."""
        place = tensor.untyped_storage().data_ptr()
        if place in self.others:
            return
        self.uses[place] = self.uses.get(place, 0) + 1
        if self.uses[place] == 1:
            self.now[tensor.dtype] += tensor.untyped_storage().nbytes()
            self.highest = max(self.highest, self.now.copy(), key=Counter.total)

    def drop(self, tensor: Tensor) -> None:
        """It is freed."""
        place = tensor.untyped_storage().data_ptr()
        if place in self.others:
            return
        self.uses[place] -= 1
        if not self.uses[place]:
            self.now[tensor.dtype] -= tensor.untyped_storage().nbytes()


class _Saved:
    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.add(tensor)

    def __del__(self) -> None:
        self.kept.drop(self.tensor)
