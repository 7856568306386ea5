"""Features without gradient behind those of a batch: of what a queue appends, the engine makes no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["appended", "learned_rows", "with_rows_of"]

NOTE = "fastvlm_loss: rows with a gradient"


def appended(own: Tensor, rest: Tensor) -> Tensor:
    """`[own, rest]`, and a note that nobody wants the gradient of the rest."""
    return _noted(torch.cat([own, rest.detach()]), learned_rows(own))


def with_rows_of(made: Tensor, features: Tensor) -> Tensor:
    """The note of features for what is made of them row by row."""
    rows = learned_rows(features)
    return made if rows == features.shape[0] else _noted(made, rows)


def learned_rows(features: Tensor) -> int:
    """How many first rows of features have a gradient that somebody wants: all, unless there is a note."""
    node: Any = None if torch.compiler.is_compiling() else features.grad_fn
    return features.shape[0] if node is None else int(node.metadata.get(NOTE, features.shape[0]))


def _noted(features: Tensor, rows: int) -> Tensor:
    node: Any = None if torch.compiler.is_compiling() else features.grad_fn
    if node is not None:  # the graph has the note: what is made of the tensor, or written into it, does not
        node.metadata[NOTE] = rows
    return features
