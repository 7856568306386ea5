"""Gradients of the weights of a sum of losses: sums along rows and columns, by one operator with a fake.

For L = sum_ij w_i v_j l_ij they are dL/dw_i = sum_j v_j l_ij and dL/dv_j = sum_i w_i l_ij. The sweep that makes L has
neither; they cost a product of their own, and only where a weight is learned. Chunked PyTorch makes them on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import torch as chunked
from ..scores.problem import FIELDS, Problem
from ..scores.statistics import Sigmoid
from .ops import PROBLEM, no_autocast

__all__ = ["SUMS"]

_library = torch.library.Library("fastvlm_loss", "FRAGMENT")


def _sums(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments[:FIELDS])
    with no_autocast(problem.x.device.type):
        return chunked.sums(problem, Sigmoid(), *arguments[FIELDS:])


def _sums_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (need_rows, need_cols) = Problem(*arguments[:FIELDS]), arguments[FIELDS:]
    rows, cols = problem.x.shape[0] if need_rows else 0, problem.y.shape[0] if need_cols else 0
    return problem.scale.new_empty(rows), problem.scale.new_empty(cols)


_schema = f"({PROBLEM}, bool need_rows, bool need_cols) -> (Tensor rows, Tensor cols)"
_library.define(f"sums{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastvlm_loss::sums", _sums_fake, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("sums", _sums, _device)

SUMS = torch.ops.fastvlm_loss.sums.default
