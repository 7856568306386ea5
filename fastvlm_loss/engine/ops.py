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

__all__ = ["GRADIENT", "STATISTICS", "no_autocast"]

_PROBLEM = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? target, Tensor? row_id, Tensor? col_id, Tensor? targets"
)
_STATISTICS = (
    f"({_PROBLEM}, str epilogue, int flags, bool keep) -> (Tensor nll, Tensor gap, Tensor state, Tensor products)"
)
_GRADIENT = (
    f"({_PROBLEM}, Tensor state, Tensor products, Tensor d_nll, Tensor? d_gap, str epilogue, int flags, bool need_x,"
    " bool need_y) -> (Tensor dx, Tensor dy, Tensor d_scale, Tensor d_bias)"
)

_library = torch.library.Library("fastvlm_loss", "DEF")


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Statistics are computed in the dtypes of the `Problem`, whatever autocast says."""
    # entering torch.autocast costs as much as the op itself, so only where it is on
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _statistics(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None, row_id: Tensor | None,
    col_id: Tensor | None, targets: Tensor | None, epilogue: str, flags: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, statistic = Problem(x, y, scale, bias, target, row_id, col_id), decode(epilogue, flags)
    with no_autocast(x.device.type):
        state, products = chunked.statistics(problem, statistic, keep)
        nll, *gap = statistic.finish(state, targets)
    return nll, gap[0] if gap else nll.new_empty(0), state, products


def _gradient(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None, row_id: Tensor | None,
    col_id: Tensor | None, targets: Tensor | None, state: Tensor, products: Tensor, d_nll: Tensor,
    d_gap: Tensor | None, epilogue: str, flags: int, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, statistic = Problem(x, y, scale, bias, target, row_id, col_id), decode(epilogue, flags)
    cotangents = (d_nll,) if d_gap is None else (d_nll, d_gap)
    with no_autocast(x.device.type):
        operands = statistic.gradient_operands(state, targets, cotangents)
        return chunked.gradient(problem, statistic, products, operands, need_x, need_y)


def _statistics_fake(  # type: ignore[no-untyped-def]
    x, y, scale, bias, target, row_id, col_id, targets, epilogue, flags, keep
):
    statistic, m, n = decode(epilogue, flags), x.shape[0], y.shape[0]
    length = sum(statistic.lengths(m, n))
    products = scale.new_empty((m, n) if keep else (0,))
    gap = scale.new_empty(length if statistic.gap else 0)
    return scale.new_empty(length), gap, scale.new_empty((statistic.fields, length)), products


def _gradient_fake(  # type: ignore[no-untyped-def]
    x, y, scale, bias, target, row_id, col_id, targets, state, products, d_nll, d_gap, epilogue, flags, need_x, need_y
):
    dx, dy = x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))
    return dx, dy, scale.new_empty(()), scale.new_empty(())


for _backend in ("torch", "cpp"):
    _library.define(f"statistics.{_backend}{_STATISTICS}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"gradient.{_backend}{_GRADIENT}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastvlm_loss::statistics.{_backend}", _statistics_fake, lib=_library)
    torch.library.register_fake(f"fastvlm_loss::gradient.{_backend}", _gradient_fake, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("statistics.torch", _statistics, _device)
    _library.impl("gradient.torch", _gradient, _device)

STATISTICS = {"torch": torch.ops.fastvlm_loss.statistics.torch, "cpp": torch.ops.fastvlm_loss.statistics.cpp}
GRADIENT = {"torch": torch.ops.fastvlm_loss.gradient.torch, "cpp": torch.ops.fastvlm_loss.gradient.cpp}
