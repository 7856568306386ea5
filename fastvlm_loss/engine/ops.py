"""The op boundary: two operators with fakes, defined once; everything a compiler or profiler sees of the engine.

`Library.define` with one implementation for all devices (the backend's name travels as an argument, because backward
may run in another thread than the `backend(...)` block that chose it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import decode
from .dispatch import implementation

__all__ = ["gradient", "statistics"]

_PROBLEM = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? target, Tensor? row_id, Tensor? col_id"
_STATISTIC = "str backend, str epilogue, int flags"

_library = torch.library.Library("fastvlm_loss", "DEF")
_library.define(f"statistics({_PROBLEM}, {_STATISTIC}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"gradient({_PROBLEM}, Tensor operands, Tensor unit, {_STATISTIC}, bool need_x, bool need_y, bool need_sums)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _statistics(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None,
    row_id: Tensor | None, col_id: Tensor | None, backend: str, epilogue: str, flags: int,
) -> Tensor:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        problem = Problem(x, y, scale, bias, target, row_id, col_id)
        return implementation(backend).statistics(problem, decode(epilogue, flags))  # type: ignore[no-any-return]


def _gradient(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None,
    row_id: Tensor | None, col_id: Tensor | None, operands: Tensor, unit: Tensor, backend: str, epilogue: str,
    flags: int, need_x: bool, need_y: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        problem = Problem(x, y, scale, bias, target, row_id, col_id)
        return implementation(backend).gradient(  # type: ignore[no-any-return]
            problem, decode(epilogue, flags), operands, unit, need_x, need_y, need_sums
        )


def _statistics_fake(x, y, scale, bias, target, row_id, col_id, backend, epilogue, flags):  # type: ignore[no-untyped-def]
    statistic = decode(epilogue, flags)
    return scale.new_empty((statistic.fields, sum(statistic.lengths(x.shape[0], y.shape[0]))))


def _gradient_fake(  # type: ignore[no-untyped-def]
    x, y, scale, bias, target, row_id, col_id, operands, unit, backend, epilogue, flags, need_x, need_y, need_sums
):
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,)), scale.new_empty(2)


for _device in ("CPU", "CUDA"):
    _library.impl("statistics", _statistics, _device)
    _library.impl("gradient", _gradient, _device)
torch.library.register_fake("fastvlm_loss::statistics", _statistics_fake, lib=_library)
torch.library.register_fake("fastvlm_loss::gradient", _gradient_fake, lib=_library)

statistics = torch.ops.fastvlm_loss.statistics.default
gradient = torch.ops.fastvlm_loss.gradient.default
