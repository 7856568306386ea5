"""The C++ library in `csrc`: fp32 and bf16 on the CPU, both directions from one pass of scores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import Softmax

__all__ = ["gradient", "instruction_set", "refuses", "statistics", "unavailable"]


def _load() -> str:
    """Load the library; the reason if that fails, else an empty string."""
    library = Path(__file__).parents[1] / "_C.abi3.so"
    if not library.exists():
        return "the C++ library was not built (FASTVLM_LOSS_CPP=1 pip install --no-build-isolation . says why)"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the C++ library does not load: {str(error).splitlines()[0]}"
    return ""


_REASON = _load()  # at import, so that a compiled graph sees a constant


def unavailable() -> str:
    """Why this backend is not live, or an empty string."""
    return _REASON


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """What this backend wants instead of features like these, or an empty string."""
    fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return "" if fits else "float32 or bfloat16 features on cpu"


def instruction_set() -> str:
    """The instruction set chosen at run time, for instance `avx512+bf16`."""
    return str(torch.ops.fastvlm_loss_cpp.instruction_set())


def statistics(problem: Problem, statistic: Softmax) -> Tensor:
    """State `[fields, L]` of all rows, then all columns."""
    p = problem
    return torch.ops.fastvlm_loss_cpp.softmax_statistics(  # type: ignore[no-any-return]
        p.x, p.y, p.scale, p.bias, p.target, p.row_id, p.col_id, statistic.flags
    )


def gradient(
    problem: Problem, statistic: Softmax, operands: Tensor, unit: Tensor, need_x: bool, need_y: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx`, `dy` (empty if not needed) and `[sum G c, sum G]` with c = <x, y>; G is `unit` times the gradient tiles."""
    p = problem
    return torch.ops.fastvlm_loss_cpp.softmax_gradient(  # type: ignore[no-any-return]
        p.x, p.y, p.scale, p.bias, p.target, p.row_id, p.col_id, operands, unit,
        statistic.flags, need_x, need_y, need_sums,
    )  # fmt: skip
