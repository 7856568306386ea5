"""Late interaction in the engine: from an `Interaction` to differentiable statistics of its pair scores.

The same statistics as of a score matrix, but rows and columns have scores of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import interaction as chunked
from ..scores.function import apply, once
from ..scores.interaction import FIELDS, Interaction
from ..scores.statistics import Softmax
from .dispatch import _forced
from .interaction_group import Sharded
from .interaction_ops import STATISTICS, gradients
from .ops import no_autocast
from .tile import SoftmaxTile

__all__ = ["softmax"]


def softmax(
    p: Interaction, *, rows: bool = True, cols: bool = True, gap: bool = False, positives: str = "mask",
    hardest: bool = False,
) -> SoftmaxTile:  # fmt: skip
    """`tile.softmax` of the image scores along rows and of the text scores along columns.

    Differentiable in tokens, weights, scale and bias.

    Raises:
        ValueError: a backend that has no late interaction was forced.
    """
    # with neither ids nor several images a text, equal ids say nothing: see `tile.softmax`
    several = p.pairs.row_id is not None or (positives == "in" and p.pairs.target is not None)
    statistic = Softmax(rows=rows, cols=cols, gap=gap, hardest=hardest, positives=positives if several else "mask")
    counts = p.pairs.positives() if statistic.positive_ids else p.pairs.targets()
    known = [t for t, wanted in zip(counts, (rows, cols), strict=True) if wanted and t is not None]
    targets = torch.cat(known) if known else None
    if _forced.name in ("cpp", "triton"):
        raise ValueError(f"backend: got {_forced.name!r} for late interaction, wanted 'auto', 'torch' or 'dense'")
    shard = p.pairs.shard
    if shard is not None:
        if _forced.name == "dense":
            raise ValueError("backend: got 'dense' beside group=, wanted one that works in tiles")
        found = apply(Sharded, shard, *p.tensors(), targets, statistic.flags)
    elif _forced.name == "dense":
        with no_autocast(p.x.device.type):
            found = chunked.dense(p, statistic, targets)
    else:
        found = apply(_Statistics, *p.tensors(), targets, statistic.flags)
    return SoftmaxTile(
        nll=found[0], gap=found[1] if gap else None, targets=statistic.known(found[-1], targets),
        lengths=statistic.lengths(p.pairs.m, p.pairs.n), statistic=statistic, counts=targets, state=found[-1],
    )  # fmt: skip


class _Statistics(torch.autograd.Function):
    """`(*interaction, targets [L], flags) -> (*vectors [L], state [fields, L])`; the state has no gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the op; its state is all that is kept for backward."""
        *tensors, targets, flags = arguments
        nll, gap, state = STATISTICS(*tensors, targets, flags)
        ctx.save_for_backward(*tensors, targets, state)
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        ctx.flags = flags
        return (nll, gap, state) if Softmax.of(flags).gap else (nll, state)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of tokens, weights, scale and bias; what needs none costs none."""
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        tensors, (targets, state) = saved[:FIELDS], saved[FIELDS:]
        wanted = [d_nll, more[0]] if Softmax.of(ctx.flags).gap else [d_nll]
        given = [state.new_zeros(state.shape[1:]) if c is None else c.contiguous() for c in wanted]
        return (*once(gradients(tensors, targets, state, given, ctx.flags, needs), tensors, needs), None, None)
