"""Gradients of the weights of a sum of losses: sums along rows and columns, by one operator with a fake.

For L = sum_ij w_i v_j l_ij they are dL/dw_i = sum_j v_j l_ij and dL/dv_j = sum_i w_i l_ij. The sweep that makes L has
neither; they cost a product of their own, and only where a weight is learned. Chunked PyTorch makes them on any device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import torch as chunked
from ..scores.problem import FIELDS, Problem
from ..scores.statistics import Sigmoid
from .define import operator
from .ops import PROBLEM, no_autocast

__all__ = ["SUMS"]


def _sums(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments[:FIELDS])
    with no_autocast(problem.x.device.type):
        return chunked.sums(problem, Sigmoid(), *arguments[FIELDS:])


def _sums_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (need_rows, need_cols) = Problem(*arguments[:FIELDS]), arguments[FIELDS:]
    rows, cols = problem.x.shape[0] if need_rows else 0, problem.y.shape[0] if need_cols else 0
    return problem.scale.new_empty(rows), problem.scale.new_empty(cols)


SUMS = operator("sums", f"({PROBLEM}, bool need_rows, bool need_cols) -> (Tensor rows, Tensor cols)", _sums, _sums_fake)
