"""The C++ library in `csrc`: fp32 and bf16 on the CPU, both directions from one pass of scores.

Loading it registers the CPU implementation of the operators' `cpp` overloads; nothing of it passes through Python.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from ..scores.problem import Problem
from ..scores.statistic import Statistic
from ..scores.statistics import Sigmoid

__all__ = ["AUTO", "instruction_set", "refuses", "runs_on", "unavailable"]

AUTO = True

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512+bf16")  # what FASTVLM_LOSS_CPU_ISA may lower the choice to


def _load() -> str:
    """Load the library; the reason if that fails, else an empty string."""
    # FASTVLM_LOSS_LIBRARY: another build of the library, for instance the one under sanitizers
    library = Path(os.environ.get("FASTVLM_LOSS_LIBRARY") or Path(__file__).parents[1] / "_C.abi3.so")
    if not library.exists():
        return "the C++ library was not built (FASTVLM_LOSS_CPP=1 pip install --no-build-isolation . says why)"
    wanted = os.environ.get("FASTVLM_LOSS_CPU_ISA")
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        warnings.warn(
            f"FASTVLM_LOSS_CPU_ISA: got {wanted!r}, wanted one of {', '.join(INSTRUCTION_SETS)}; ignored", stacklevel=2
        )
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the C++ library does not load: {str(error).splitlines()[0]}"
    return ""


_REASON = _load()  # at import, so that a compiled graph sees a constant


def unavailable() -> str:
    """Why this backend is not live, or an empty string."""
    return _REASON


def refuses(problem: Problem, statistic: Statistic | Sigmoid) -> str:
    """What this backend wants instead of a problem like this, or an empty string."""
    if _REASON:
        return "the C++ library to be built"
    if problem.x.device.type != "cpu" or problem.x.dtype not in (torch.float32, torch.bfloat16):
        return "float32 or bfloat16 features on cpu"
    return ""


def runs_on() -> str:
    """The device and the instruction set chosen at run time, for instance `CPU, avx512+bf16`."""
    return f"CPU, {instruction_set()}"


def instruction_set() -> str:
    """The instruction set chosen at run time, for instance `avx512+bf16`."""
    return str(torch.ops.fastvlm_loss.instruction_set())
