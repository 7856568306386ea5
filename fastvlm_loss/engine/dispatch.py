"""Which backend computes: `auto` picks, `backend(name)` forces, `report` says which are live and why others are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..backends import cpp, triton
from ..scores.check import choice
from ..scores.problem import Problem
from ..scores.statistic import Statistic
from ..scores.statistics import Sigmoid

__all__ = ["BACKENDS", "backend", "report", "resolve"]

BACKENDS = ("auto", "torch", "cpp", "triton", "dense")
_OPTIONAL = {"triton": triton, "cpp": cpp}  # in the order of preference


class _Forced(threading.local):
    name = "auto"


_forced = _Forced()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute every loss this thread calls inside the block with one backend (its backward too, wherever that runs).

    Args:
        name: "auto" (the fastest that fits), "torch" (chunked PyTorch), "cpp" (the C++ library, CPU only),
            "triton" (the GPU kernels) or "dense" (the reference: builds the whole score matrix).

    Raises:
        ValueError: unknown name, or a backend that is not live here, with the reason.
    """
    choice("backend", name, BACKENDS)
    reason = _OPTIONAL[name].unavailable() if name in _OPTIONAL else ""
    if reason:
        raise ValueError(f"backend: got {name!r}, which is not live here: {reason}")
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def resolve(problem: Problem, statistic: Statistic | Sigmoid) -> str:
    """The backend that serves this problem now."""
    name = _forced.name
    if name == "auto":
        for optional, module in _OPTIONAL.items():
            if module.AUTO and not module.refuses(problem, statistic):
                return optional
        return "torch"
    if name in _OPTIONAL:
        wanted = _OPTIONAL[name].refuses(problem, statistic)
        if wanted:
            got = f"{problem.x.dtype} features on {problem.x.device} for {statistic.name}"
            raise ValueError(f"backend: got {name!r} for {got}, wanted {wanted}")
    return name


def report() -> dict[str, str]:
    """For each backend "live" with what it runs on, or the reason why it is not."""
    found = {"dense": "live: the reference, builds the score matrix", "torch": "live: chunked PyTorch, any device"}
    for name, module in reversed(_OPTIONAL.items()):
        reason = module.unavailable()
        found[name] = f"not live: {reason}" if reason else f"live: {module.runs_on()}"
    return found
