"""What a launch takes: the GPU at hand, features and the workspace as kernels read and write them, library products."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plan
from .lang import HAS_TRITON

__all__ = ["INTERPRETED", "add_product", "aligned", "descriptor", "device", "operand", "precision", "ranks"]

STAND_IN = (90, 2)  # the GPU that the interpreter stands for: architecture, multiprocessors


def _interpreted() -> bool:
    if not HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


INTERPRETED = _interpreted()  # at import, as Triton decides it, and so that a compiled graph sees a constant


def device() -> tuple[int, int]:
    """Compute capability times ten, and streaming multiprocessors, of the current GPU."""
    if INTERPRETED:
        return STAND_IN
    from triton.runtime import driver

    return _properties(driver.active, driver.active.get_current_device())


@functools.cache
def _properties(active: Any, device: int) -> tuple[int, int]:
    properties = active.utils.get_device_properties(device)
    return int(active.get_current_target().arch), int(properties["multiprocessor_count"])


def precision(dtype: torch.dtype) -> str:
    """How products of scores are made: "half", or of fp32 as `torch.set_float32_matmul_precision` says.

    "highest" is IEEE, "high" three TF32 products for one, "medium" TF32. Of torch's newer setting of its own,
    `torch.backends.cuda.matmul.fp32_precision`, "tf32" is TF32 and all else IEEE.
    """
    if dtype != torch.float32:
        return "half"
    try:
        return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the newer setting is in use, and torch refuses to translate
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def aligned(t: Tensor) -> Tensor:
    """The same features with rows of a multiple of 16 bytes; the zeros that are added change no product."""
    missing = -t.shape[1] % (16 // t.element_size())
    if missing:
        return F.pad(t, (0, missing))
    return t if t.data_ptr() % 16 == 0 else t.clone()


def operand(t: Tensor, rows: int, depth: int, tma: bool) -> Any:
    """Features as a product reads them, in tiles of `[rows, depth]`: a descriptor or a pointer."""
    return descriptor(t, rows, depth) if tma else t


def descriptor(t: Tensor, rows: int, cols: int) -> Any:
    """A TMA descriptor of a matrix in tiles of `[rows, cols]`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # strides as they ought to be: a tensor of one row may have any
    stride = t.stride(0) if t.shape[0] > 1 else plan.round_up(t.shape[1], 16)
    return TensorDescriptor(t, list(t.shape), [stride, 1], [rows, cols])


def ranks(row_id: Tensor, col_id: Tensor) -> tuple[Tensor, Tensor]:
    """The ids as 32-bit ranks (-1 stays), which cost a kernel half the registers."""
    ids = torch.cat([row_id, col_id])
    order = ids.argsort()
    ordered = ids[order]
    rank = F.pad((ordered[1:] != ordered[:-1]).int(), (1, 0)).cumsum(0, dtype=torch.int32)
    rank = torch.empty_like(rank).scatter_(0, order, rank).masked_fill_(ids == -1, -1)
    return rank[: row_id.shape[0]], rank[row_id.shape[0] :].clone()


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b` with fp32 accumulation by the library."""
    if a.dtype == torch.float32 or not out.is_cuda:
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
