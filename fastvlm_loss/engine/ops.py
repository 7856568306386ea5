"""The op boundary: four operators with fakes, an overload a backend; all a compiler or profiler sees of the engine.

`Library.define` with implementations by device; the C++ library registers those of `cpp` itself. The overload is chosen
in forward and kept for backward, which may run in another thread than the `backend(...)` block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backends import torch as chunked
from ..backends import triton as gpu
from ..scores.problem import FIELDS, Problem
from ..scores.selection import Selection
from ..scores.statistics import Sigmoid, decode, gradient_dtype
from .define import operator

__all__ = ["GRADIENT", "KEPT_PRODUCTS", "PROBLEM", "SELECT", "STATISTICS", "SWEEP", "no_autocast"]

PROBLEM = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? target, Tensor? row_id, Tensor? col_id, "
    "Tensor? row_factor, Tensor? col_factor, Tensor? teacher_x, Tensor? teacher_y, Tensor? teacher_scale, "
    "Tensor? col_bias, Tensor? row_limit, Tensor? col_limit, Tensor? numbers"
)
_SCHEMAS = {
    "statistics": f"({PROBLEM}, Tensor? targets, str epilogue, int flags, bool keep)"
    " -> (Tensor nll, Tensor gap, Tensor state, Tensor products)",
    "select": f"({PROBLEM}, Tensor? targets, str epilogue, int flags, bool keep, int k, bool noise, Tensor law,"
    " Tensor? totals, Tensor place)"
    " -> (Tensor nll, Tensor gap, Tensor state, Tensor products, Tensor order, Tensor best)",
    "gradient": f"({PROBLEM}, Tensor? targets, Tensor state, Tensor products, Tensor d_nll, Tensor? d_gap,"
    " str epilogue, int flags, bool need_x, bool need_y, bool need_scale, bool need_col, int rows=-1, int cols=-1)"
    " -> (Tensor dx, Tensor dy, Tensor d_scale, Tensor d_bias, Tensor d_col)",
    "sweep": f"({PROBLEM}, bool need_x, bool need_y, bool need_scale, int rows=-1, int cols=-1)"
    " -> (Tensor total, Tensor dx, Tensor dy, Tensor d_scale, Tensor d_bias)",
}
# products a backend keeps for backward instead of making them again, for a batch whose matrix is one small tile
KEPT_PRODUCTS = {"torch": 1024 * 1024, "cpp": 1024 * 1024, "triton": 0}


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Statistics are computed in the dtypes of the `Problem`, whatever autocast says."""
    # entering torch.autocast costs as much as the op itself, so only where it is on
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def factors(problem: Problem, lengths: tuple[int, int]) -> Tensor | None:
    """The factors `[L]` of the rows and columns that a statistic looks at."""
    parts = [f for f, n in zip((problem.row_factor, problem.col_factor), lengths, strict=True) if n and f is not None]
    if parts:
        return torch.cat(parts)
    return None if problem.row_factor is None else problem.row_factor[:0]


def _statistics(backend: Any) -> Any:
    def statistics(*arguments: Any) -> tuple[Tensor, ...]:
        return _finished(backend, arguments, None)[:4]

    return statistics


def _select(backend: Any) -> Any:
    def select(*arguments: Any) -> tuple[Tensor, ...]:
        return _finished(backend, arguments[: FIELDS + 4], Selection(*arguments[FIELDS + 4 :]))

    return select


def _finished(backend: Any, arguments: tuple[Any, ...], selection: Selection | None) -> tuple[Tensor, ...]:
    targets, epilogue, flags, keep = arguments[FIELDS:]
    problem, statistic = Problem(*arguments[:FIELDS]), decode(epilogue, flags)
    with no_autocast(problem.x.device.type):
        state, products, best = backend.statistics(problem, statistic, keep, selection)
        lengths = statistic.lengths(problem.x.shape[0], problem.y.shape[0])
        nll, *gap = statistic.finish(state, targets, factors(problem, lengths) if statistic.factor else None)
    return nll, gap[0] if gap else nll.new_empty(0), state, products, *(best or ())


def _wanted(p: Problem, need_x: bool, need_y: bool, rows: int = -1, cols: int = -1) -> tuple[int | None, int | None]:
    """Of how many first rows and columns the features' gradient is wanted (-1: all), None where it is not needed."""
    of_x, of_y = (t.shape[0] if size < 0 else size for t, size in ((p.x, rows), (p.y, cols)))
    return of_x if need_x else None, of_y if need_y else None


def _gradient(backend: Any) -> Any:
    def gradient(*arguments: Any) -> Any:
        targets, state, products, d_nll, d_gap, epilogue, flags, *needs = arguments[FIELDS:]
        need_x, need_y, need_scale, need_col, *learned = needs
        problem, statistic = Problem(*arguments[:FIELDS]), decode(epilogue, flags)
        cotangents = (d_nll,) if d_gap is None else (d_nll, d_gap)
        with no_autocast(problem.x.device.type):
            lengths = statistic.lengths(problem.x.shape[0], problem.y.shape[0])
            own = factors(problem, lengths) if statistic.factor else None
            unit = backend.unit(problem, statistic, cotangents)
            beta = 0.0 if problem.numbers is None else problem.numbers[0]
            operands = statistic.gradient_operands(state, targets, own, tuple(c / unit for c in cotangents), beta)
            wanted = _wanted(problem, need_x, need_y, *learned)
            return backend.gradient(problem, statistic, products, operands, unit, *wanted, need_scale, need_col)

    return gradient


def _sweep(backend: Any) -> Any:
    def sweep(*arguments: Any) -> Any:
        problem, (need_x, need_y, need_scale, *learned) = Problem(*arguments[:FIELDS]), arguments[FIELDS:]
        with no_autocast(problem.x.device.type):
            wanted = _wanted(problem, need_x, need_y, *learned)
            return backend.sweep(problem, Sigmoid(problem.row_factor is not None), *wanted, need_scale)

    return sweep


def _statistics_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, (_, epilogue, flags, keep) = Problem(*arguments[:FIELDS]), arguments[FIELDS:]
    statistic, m, n = decode(epilogue, flags), problem.x.shape[0], problem.y.shape[0]
    length, scale = sum(statistic.lengths(m, n)), problem.scale
    gap = scale.new_empty(length if statistic.gap else 0)
    products = scale.new_empty((m, n) if keep else (0,))
    return scale.new_empty(length), gap, scale.new_empty((statistic.fields, length)), products


def _select_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, k = Problem(*arguments[:FIELDS]), arguments[FIELDS + 4]
    nll, gap, state, products = _statistics_fake(*arguments[: FIELDS + 4])
    length = state.shape[1]
    none = nll if state.shape[0] else nll.new_empty(0)  # a selection alone has no statistic
    return none, gap, state, products, problem.x.new_empty((length, k), dtype=torch.int64), nll.new_empty((length, k))


def _gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    need_x, need_y, _, need_col, *learned = arguments[FIELDS + 7 :]
    return _new_gradients(Problem(*arguments[:FIELDS]), need_x, need_y, need_col, *learned)


def _new_gradients(p: Problem, need_x: bool, need_y: bool, need_col: bool, *learned: int) -> tuple[Tensor, ...]:
    wanted, scale = zip((p.x, p.y), _wanted(p, need_x, need_y, *learned), strict=True), p.scale
    dx, dy = (t.new_empty((0,) if size is None else (size, t.shape[1])) for t, size in wanted)
    return dx, dy, scale.new_empty(()), scale.new_empty(()), scale.new_empty(p.y.shape[0] if need_col else 0)


def _sweep_fake(*arguments: Any) -> tuple[Tensor, ...]:
    need_x, need_y, _, *learned = arguments[FIELDS:]
    dx, dy, d_scale, d_bias, _ = _new_gradients(Problem(*arguments[:FIELDS]), need_x, need_y, False, *learned)
    dtype = gradient_dtype(dx.dtype)
    return arguments[2].new_empty(()), dx.to(dtype), dy.to(dtype), d_scale, d_bias


_MAKE = {"statistics": _statistics, "select": _select, "gradient": _gradient, "sweep": _sweep}
_FAKES = {"statistics": _statistics_fake, "select": _select_fake, "gradient": _gradient_fake, "sweep": _sweep_fake}
# the library in csrc/ brings kernels of its own
_MODULES: dict[str, Any] = {"torch": chunked, "cpp": None, "triton": gpu}

STATISTICS, SELECT, GRADIENT, SWEEP = (
    {
        backend: operator(f"{name}.{backend}", schema, None if module is None else _MAKE[name](module), _FAKES[name])
        for backend, module in _MODULES.items()
    }
    for name, schema in _SCHEMAS.items()
)
