"""What the first call of a loss costs before it computes: seconds, and kernels that Triton compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["first_call"]


def first_call(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Make the call: `seconds`, and the kernels `compiled` and taken `from_cache` (None without Triton)."""
    with _kernels() as hits:
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    compiled, from_cache = (None, None) if hits is None else (hits.count(False), hits.count(True))
    return {"seconds": seconds, "compiled": compiled, "from_cache": from_cache}


@contextmanager
def _kernels() -> Iterator[list[bool] | None]:
    """Whether each kernel made inside the block came from the cache on disk."""
    try:
        from triton import knobs
    except ImportError:
        yield None
        return
    hits: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *_, cache_hit, **__: hits.append(cache_hit)
    try:
        yield hits
    finally:
        knobs.compilation.listener = before
