"""The op boundary: two operators with fakes, an overload a backend; all a compiler or profiler sees of the engine.

`Library.define` with implementations by device; the C++ library registers those of `cpp` itself. The overload is chosen
in forward and kept for backward, which may run in another thread than the `backend(...)` block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..backends import torch as chunked
from ..scores.problem import Problem
from ..scores.statistics import decode

__all__ = ["GRADIENT", "STATISTICS"]

_PROBLEM = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? target, Tensor? row_id, Tensor? col_id"
_STATISTIC = "str epilogue, int flags"
_NEEDS = "bool need_x, bool need_y, bool need_sums"

_library = torch.library.Library("fastvlm_loss", "DEF")


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # entering torch.autocast costs as much as the op itself
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _statistics(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None,
    row_id: Tensor | None, col_id: Tensor | None, epilogue: str, flags: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = Problem(x, y, scale, bias, target, row_id, col_id)
    with _no_autocast(x.device.type):
        return chunked.statistics(problem, decode(epilogue, flags), keep)


def _gradient(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None,
    row_id: Tensor | None, col_id: Tensor | None, products: Tensor, operands: Tensor, unit: Tensor | None,
    epilogue: str, flags: int, need_x: bool, need_y: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(x, y, scale, bias, target, row_id, col_id)
    with _no_autocast(x.device.type):
        return chunked.gradient(problem, decode(epilogue, flags), products, operands, unit, need_x, need_y, need_sums)


def _statistics_fake(x, y, scale, bias, target, row_id, col_id, epilogue, flags, keep):  # type: ignore[no-untyped-def]
    statistic = decode(epilogue, flags)
    state = scale.new_empty((statistic.fields, sum(statistic.lengths(x.shape[0], y.shape[0]))))
    return state, scale.new_empty((x.shape[0], y.shape[0]) if keep else (0,))


def _gradient_fake(  # type: ignore[no-untyped-def]
    x, y, scale, bias, target, row_id, col_id, products, operands, unit, epilogue, flags, need_x, need_y, need_sums
):
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,)), scale.new_empty(2)


for _backend in ("torch", "cpp"):
    _library.define(
        f"statistics.{_backend}({_PROBLEM}, {_STATISTIC}, bool keep) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
    )
    _library.define(
        f"gradient.{_backend}({_PROBLEM}, Tensor products, Tensor operands, Tensor? unit, {_STATISTIC}, {_NEEDS})"
        " -> (Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"fastvlm_loss::statistics.{_backend}", _statistics_fake, lib=_library)
    torch.library.register_fake(f"fastvlm_loss::gradient.{_backend}", _gradient_fake, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("statistics.torch", _statistics, _device)
    _library.impl("gradient.torch", _gradient, _device)

STATISTICS = {"torch": torch.ops.fastvlm_loss.statistics.torch, "cpp": torch.ops.fastvlm_loss.statistics.cpp}
GRADIENT = {"torch": torch.ops.fastvlm_loss.gradient.torch, "cpp": torch.ops.fastvlm_loss.gradient.cpp}
