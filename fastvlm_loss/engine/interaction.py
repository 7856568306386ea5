"""Late interaction in the engine: from an `Interaction` to differentiable statistics of its pair scores.

The same statistics as of a score matrix, but rows and columns have scores of their own. Two operators with fakes are
the boundary, as in `ops.py`; chunked PyTorch computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import interaction as chunked
from ..scores.interaction import FIELDS, Interaction
from ..scores.shard import Shard
from ..scores.statistics import Softmax
from .dispatch import _forced
from .function import apply, once
from .ops import no_autocast
from .sharded import joined, of_own
from .tile import SoftmaxTile

__all__ = ["GRADIENT", "STATISTICS", "softmax"]

_TOKENS = (
    "Tensor x, Tensor y, Tensor x_weight, Tensor y_weight, Tensor? x_padding, Tensor? y_padding, Tensor scale, "
    "Tensor? bias, Tensor? target, Tensor? row_id, Tensor? col_id, Tensor? targets"
)
_SCHEMAS = {
    "interaction": f"({_TOKENS}, int flags) -> (Tensor nll, Tensor gap, Tensor state)",
    "interaction_gradient": f"({_TOKENS}, Tensor state, Tensor d_nll, Tensor? d_gap, int flags, bool need_x,"
    " bool need_y, bool need_x_weight, bool need_y_weight)"
    " -> (Tensor dx, Tensor dy, Tensor dx_weight, Tensor dy_weight, Tensor d_scale)",
}
BIAS, SCALE, TARGET, ROW_ID = 7, 6, 8, 9
OF_ROWS, OF_COLS = (0, 2), (1, 3)  # tokens and weights

_library = torch.library.Library("fastvlm_loss", "FRAGMENT")


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
        found = apply(_Sharded, shard, *p.tensors(), targets, statistic.flags)
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
        return (*once(_gradients(tensors, targets, state, given, ctx.flags, needs), tensors, needs), None, None)


class _Sharded(torch.autograd.Function):
    """`(shard, *interaction, targets [L], flags) -> (*vectors [L], state [fields, L])`, of the group.

    As `sharded.Sharded`: every process scores its images with the texts of all, whose tokens are gathered.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Own images with all texts, and the exchange of states."""
        shard, *tensors, targets, flags = arguments
        statistic, local = Softmax.of(flags), _localised(tensors, shard)
        rows, own = statistic.lengths(sum(shard.rows), 0)[0], shard.own_rows
        state = joined(STATISTICS(*local, of_own(targets, own, rows), flags)[2], statistic, shard)
        ctx.save_for_backward(*tensors, *local, targets, state)
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        ctx.place = shard, rows, flags
        return (*statistic.finish(state, targets, None), state)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the own images whole, of the texts the sum; times the number of processes."""
        saved, needs, (shard, rows, flags) = ctx.saved_tensors, ctx.needs_input_grad[1:], ctx.place
        tensors, local, (targets, state) = saved[:FIELDS], saved[FIELDS:-2], saved[-2:]
        wanted = [d_nll, more[0]] if Softmax.of(flags).gap else [d_nll]
        given = [state.new_zeros(state.shape[1:]) if c is None else c for c in wanted]
        targets, state, *given = (of_own(t, shard.own_rows, rows) for t in (targets, state, *given))
        found = _gradients(local, targets, state, given, flags, needs)
        for k in (*OF_ROWS, *OF_COLS, SCALE):
            found[k] = found[k] * shard.world if needs[k] else None
        for k in OF_COLS:  # nothing is sent for a frozen tower
            found[k] = shard.collectives.scatter(found[k], shard.cols) if needs[k] else None
        return (None, *once(found, tensors, needs), None, None)


def _localised(tensors: list[Any], shard: Shard) -> list[Any]:
    """The own images, with the texts of all processes."""
    local = list(tensors)
    for k in (*OF_COLS, 5):
        local[k] = None if local[k] is None else shard.gather_cols(local[k].detach())
    if local[TARGET] is None:
        local[TARGET] = torch.arange(sum(shard.rows), device=local[0].device)
    for k in (TARGET, ROW_ID):
        local[k] = None if local[k] is None else local[k][shard.own_rows]
    return local


def _gradients(
    tensors: Any, targets: Tensor | None, state: Tensor, given: list[Tensor], flags: int, needs: tuple[bool, ...]
) -> list[Any]:
    """A gradient a field, where needed."""
    found: list[Any] = [None] * FIELDS
    if any(needs[:4]) or needs[SCALE]:
        d_gap = given[1] if len(given) > 1 else None
        *found[:4], found[SCALE] = GRADIENT(*tensors, targets, state, given[0], d_gap, flags, *needs[:4])
    if needs[BIAS]:
        found[BIAS] = torch.zeros_like(tensors[BIAS])  # a constant added to every score changes nothing
    return found


def _statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    targets, flags = arguments[FIELDS:]
    p, statistic = Interaction.from_tensors(arguments[:FIELDS]), Softmax.of(flags)
    with torch.no_grad(), no_autocast(p.x.device.type):
        state = chunked.statistics(p, statistic)
        nll, *gap = statistic.finish(state, targets, None)
    return nll, gap[0] if gap else nll.new_empty(0), state


def _gradient(*arguments: Any) -> tuple[Tensor, ...]:
    targets, state, d_nll, d_gap, flags, *needs = arguments[FIELDS:]
    p, statistic = Interaction.from_tensors(arguments[:FIELDS]), Softmax.of(flags)
    with torch.no_grad(), no_autocast(p.x.device.type):  # create_graph=True
        cotangents = (d_nll,) if d_gap is None else (d_nll, d_gap)
        operands = statistic.gradient_operands(state, targets, None, cotangents)
        return chunked.gradient(p, statistic, operands, *needs)


def _statistics_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p, statistic = Interaction.from_tensors(arguments[:FIELDS]), Softmax.of(arguments[-1])
    length, scale = sum(statistic.lengths(p.x.shape[0], p.y.shape[0])), p.pairs.scale
    gap = scale.new_empty(length if statistic.gap else 0)
    return scale.new_empty(length), gap, scale.new_empty((statistic.fields, length))


def _gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    made = (t.new_empty(t.shape if need else (0,)) for t, need in zip(arguments[:4], arguments[-4:], strict=True))
    return (*made, arguments[SCALE].new_empty(()))


_MADE = {"interaction": (_statistics, _statistics_fake), "interaction_gradient": (_gradient, _gradient_fake)}
for _name, (_made, _fake) in _MADE.items():
    _library.define(f"{_name}{_SCHEMAS[_name]}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastvlm_loss::{_name}", _fake, lib=_library)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _made, _device)

STATISTICS, GRADIENT = (getattr(torch.ops.fastvlm_loss, name).default for name in _SCHEMAS)
