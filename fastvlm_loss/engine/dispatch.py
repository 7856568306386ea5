"""Which backend computes: `auto` picks, `backend(name)` forces, `report` says which are live and why others are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backends import cpp
from ..scores.check import choice

__all__ = ["BACKENDS", "backend", "report", "resolve"]

BACKENDS = ("auto", "torch", "cpp", "dense")


class _Forced(threading.local):
    name = "auto"


_forced = _Forced()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute every loss this thread calls inside the block with one backend (its backward too, wherever that runs).

    Args:
        name: "auto" (the fastest that fits), "torch" (chunked PyTorch), "cpp" (the C++ library, CPU only)
            or "dense" (the reference: builds the whole score matrix).

    Raises:
        ValueError: unknown name, or a backend that is not live here, with the reason.
    """
    choice("backend", name, BACKENDS)
    if name == "cpp" and cpp.unavailable():
        raise ValueError(f"backend: got 'cpp', which is not live here: {cpp.unavailable()}")
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves features of this device and dtype now."""
    if _forced.name == "auto":
        return "cpp" if not cpp.unavailable() and not cpp.refuses(device, dtype) else "torch"
    if _forced.name == "cpp" and cpp.refuses(device, dtype):
        raise ValueError(f"backend: got 'cpp' for {dtype} features on {device}, wanted {cpp.refuses(device, dtype)}")
    return _forced.name


def report() -> dict[str, str]:
    """For each backend "live" with what it runs on, or the reason why it is not."""
    reason = cpp.unavailable()
    return {
        "dense": "live: the reference, builds the score matrix",
        "torch": "live: chunked PyTorch, any device",
        "cpp": f"not live: {reason}" if reason else f"live: CPU, {cpp.instruction_set()}",
        "triton": "not live: the GPU kernels are not part of this version; CUDA features use torch",
    }
