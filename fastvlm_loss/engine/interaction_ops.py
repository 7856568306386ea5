"""The boundary of late interaction: two operators with fakes, as in `ops.py`; chunked PyTorch computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import interaction as chunked
from ..scores.interaction import FIELDS, Interaction
from ..scores.statistics import Softmax
from .define import operator
from .ops import no_autocast

__all__ = [
    "BIAS", "COL_ID", "GRADIENT", "OF_COLS", "OF_ROWS", "ROW_ID", "SCALE", "STATISTICS", "TARGET", "Y_PADDING",
    "gradients",
]  # fmt: skip

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
Y_PADDING, SCALE, BIAS, TARGET, ROW_ID, COL_ID = 5, 6, 7, 8, 9, 10
OF_ROWS, OF_COLS = (0, 2), (1, 3)  # tokens and weights


def gradients(
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


STATISTICS = operator("interaction", _SCHEMAS["interaction"], _statistics, _statistics_fake)
GRADIENT = operator("interaction_gradient", _SCHEMAS["interaction_gradient"], _gradient, _gradient_fake)
