"""The GPU backend: Triton kernels for scores, library products for the features' gradients.

Forward walks over strips of rows whose column states fit the workspace; backward over macro-tiles whose G fits it:
the gradient kernel writes G, then `dX += G Y` and `dY += G^T X` with fp32 accumulation. 8 M N D operations in all,
6 for a sweep. Nothing waits for the GPU, and the order of every sum is fixed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import configs, plan
from ..kernels.forward import forward as forward_kernel
from ..kernels.gradient import gradient as gradient_kernel
from ..kernels.lang import HAS_TRITON
from ..kernels.launch import INTERPRETED, add_product, aligned, descriptor, device, operand, precision, ranks
from ..kernels.merge import merge as merge_kernel
from ..kernels.scores import BIASED, IDS
from ..kernels.select import select as select_kernel
from ..scores.places import Places
from ..scores.problem import Problem
from ..scores.selection import Selection
from ..scores.statistic import Statistic
from ..scores.statistics import LN2, Hinge, Sigmoid, Softmax, gradient_dtype

__all__ = ["AUTO", "gradient", "refuses", "runs_on", "set_workspace", "statistics", "sweep", "unavailable", "unit"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# G of size 1 is stored as this in fp16, or a probability of 1 / N would be subnormal; no sum of its parts overflows
FP16_UNIT = 1024.0
MERGE_BLOCK = 128
WARM, MANY = 4, 16  # of a selection: blocks of rows of the first launch; places that need a smaller tile

_workspace = 256 * 2**20


def set_workspace(size: int) -> None:
    """Bound the memory that a loss may use on a GPU beyond its inputs, gradients and O(M + N) statistics.

    Args:
        size: bytes, at least 2**20; 256 MiB to begin with. Larger means fewer, larger launches. The column states
            of one row block (12 bytes a column) are the least that forward takes, whatever the bound.

    Raises:
        TypeError, ValueError: not an int, or less than 1 MiB.
    """
    global _workspace
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size: got {type(size).__name__} {size!r}, wanted a number of bytes")
    if size < 2**20:
        raise ValueError(f"size: got {size}, wanted at least {2**20} bytes")
    _workspace = size


def unavailable() -> str:
    """Why this backend is not live, or an empty string."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "no CUDA device"
    return ""


AUTO = not INTERPRETED  # which is there for tests


def refuses(problem: Problem, statistic: Statistic | Sigmoid) -> str:
    """What this backend wants instead of a problem like this, or an empty string."""
    device = problem.x.device
    if not HAS_TRITON:
        return "Triton to be installed"
    if device.type != ("cpu" if INTERPRETED else "cuda") or problem.x.dtype not in DTYPES:
        return "bfloat16, float16 or float32 features on cuda"
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major < 8:
        return "a GPU of compute capability 8.0 or later"
    return ""


def runs_on() -> str:
    """The GPU, or the interpreter."""
    return "Triton's interpreter, on CPU" if INTERPRETED else torch.cuda.get_device_name()


def statistics(
    problem: Problem, statistic: Statistic, keep: bool = False, selection: Selection | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """State `[fields, L]` of all rows, then all columns, and that of a selection, `[L, k]`.

    Keeps no products: making them again costs less than storing. Both states are of one pass where the table of tiles
    has one for it, and else of a pass each.
    """
    m, n = problem.x.shape[0], problem.y.shape[0]
    length = sum(statistic.lengths(m, n))
    places = None if selection is None else Places(selection, *selection.empty(problem.x, length))
    best = None if places is None else (places.order, places.product)
    if not m or not n:
        return statistic.identity(problem.x, torch.float32, length), problem.x.new_empty(0), best
    state = problem.scale.new_empty((statistic.fields, length))
    with _on(problem.x.device):
        if places is not None and _share(problem, statistic, places):
            _walk("fused", problem, statistic, state, places)
        else:
            if places is not None:
                _walk("select", problem, statistic, state[:0], places)
            if statistic.fields:
                _walk("forward", problem, statistic, state, None)
    return state, problem.x.new_empty(0), best


def _share(problem: Problem, statistic: Statistic, places: Places) -> bool:
    """Whether a statistic and a selection are made in one pass over the scores."""
    x, kind = problem.x, _kind("fused", statistic, problem.row_id is not None, places)
    return statistic.fields > 0 and configs.shared(device()[0], precision(x.dtype), x.shape[1], kind)


def _walk(kernel: str, problem: Problem, statistic: Statistic, state: Tensor, places: Places | None) -> None:
    """One pass over the scores into a state (which may have no fields), the places of a selection, or both.

    Each strip of rows is one launch, and others join its parts. With a selection strips double in size: what the first
    find lets the columns of the later ones leave out nearly everything.
    """
    m, n = problem.x.shape[0], problem.y.shape[0]
    rows, cols = statistic.lengths(m, n)
    call = _Call.of(kernel, problem, statistic, places)
    tile, fields, width = call.tile, state.shape[0], 0 if places is None else places.width
    most = max(1, _workspace // (4 * (fields + 12 * width) * n)) if cols else plan.ceil(m, tile.rows)

    def parts_of(count: int, length: int) -> tuple[Any, Any, Any]:
        states = problem.scale.new_empty((count, fields, length)) if fields else None
        return (None, None, states) if places is None else (*places.parts(count, length), states)

    for first, size in plan.strips(m, most, tile.rows, WARM if places is not None and cols else None):
        blocks = plan.ceil(size, tile.rows)
        count, parts = plan.parts(blocks, plan.ceil(n, tile.cols), call.processors)
        of_rows, of_cols = parts_of(parts, size) if rows else None, parts_of(blocks, n) if cols else None
        place = m, n, first, size, count
        if places is None:
            forward_kernel[(blocks * parts,)](
                *call.operands, *call.second, call.entries, of_rows and of_rows[2], of_cols and of_cols[2], *place,
                call.fold, call.flags, call.d, call.shape, call.load, **call.options,
            )  # fmt: skip
        else:
            select_kernel[(blocks * parts,)](
                *call.operands[:2], *call.second, call.entries, *places.law(rows), of_rows, of_cols, *place,
                places.how, call.fold if fields else None, call.flags, call.d, call.shape[:3], call.load,
                **call.options,
            )  # fmt: skip
        for made, at, onto in ((of_rows, slice(first, first + size), False), (of_cols, slice(rows, None), first > 0)):
            if made is not None and fields:
                _merge(made[2], state[:, at], statistic, call.fold, onto)
            if made is not None and places is not None:
                places.join(made[0], made[1], at)


def unit(problem: Problem, statistic: Statistic, cotangents: tuple[Tensor, ...]) -> Tensor:
    """What a G of size 1 in the workspace stands for: about the largest entry that G may have, whatever the loss."""
    size = _largest(*cotangents)
    if isinstance(statistic, Softmax):
        if statistic.factor and problem.row_factor is not None and problem.col_factor is not None:
            size = size * _largest(problem.row_factor, problem.col_factor).clamp(min=1.0)
        if statistic.hardness and problem.numbers is not None:
            size = size * (1.0 + problem.numbers[0].abs())
        if statistic.swapped:
            size = size * _spread(problem).clamp(min=1.0)
    return _unit(size, problem.x.dtype)


def _spread(problem: Problem) -> Tensor:
    """How far a second score may be from another, at most."""
    assert problem.teacher_x is not None and problem.teacher_y is not None and problem.teacher_scale is not None
    lengths = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float32) for t in (problem.teacher_x, problem.teacher_y))
    longest = [_largest(length) for length in lengths]
    return 2.0 * problem.teacher_scale.abs() * longest[0] * longest[1]


def _largest(*vectors: Tensor) -> Tensor:
    return torch.stack([v.abs().amax() if v.numel() else v.new_zeros(()) for v in vectors]).amax()


def _unit(size: Tensor, dtype: torch.dtype) -> Tensor:
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)  # an infinite cotangent spoils its own row only
    return size / FP16_UNIT if dtype == torch.float16 else size


def gradient(
    problem: Problem, statistic: Statistic, products: Tensor, operands: Tensor, unit: Tensor, of_x: int | None,
    of_y: int | None, need_scale: bool, need_col: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx`, `dy`, `sum G c`, `sum G`, and its column sums; of G times `unit`.

    Of x and y the gradients of the first `of_x` and `of_y` rows; empty what is None or not needed.
    """
    rows, _ = statistic.lengths(problem.x.shape[0], problem.y.shape[0])
    row = operands[:, :rows].contiguous() if statistic.rows else None
    col = operands[:, rows:].contiguous() if statistic.cols else None
    needs = _Needs(of_x, of_y, need_scale or not statistic.shift_invariant, need_col)
    dx, dy, sums, d_col = _macro_tiles(problem, statistic, row, col, unit, needs)
    return dx, dy, sums[0], sums[1], d_col


def sweep(
    problem: Problem, statistic: Sigmoid, of_x: int | None, of_y: int | None, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The total in nats, and the first four of what `gradient` returns, from one pass over the scores."""
    if problem.x.dtype == torch.float16 and problem.row_factor is None:
        problem, statistic = problem.weighted(None, None), Sigmoid(factor=True)  # which carry the unit
    row = col = None
    unit = problem.scale.new_ones(())
    if problem.row_factor is not None and problem.col_factor is not None:
        unit = _unit(_largest(problem.row_factor) * _largest(problem.col_factor), problem.x.dtype)
        row, col = (problem.row_factor / unit)[None], problem.col_factor[None]
    dx, dy, sums, _ = _macro_tiles(problem, statistic, row, col, unit, _Needs(of_x, of_y, True, False))
    return sums[2] * LN2, dx, dy, sums[0], sums[1]


@dataclass(frozen=True)
class _Needs:
    """What is wanted of G: gradients of first rows of the features, the kernel's sums, the sums of its columns."""

    x: int | None
    y: int | None
    sums: bool
    cols: bool


def _macro_tiles(
    problem: Problem, statistic: Statistic | Sigmoid, row: Tensor | None, col: Tensor | None, unit: Tensor,
    needs: _Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx`, `dy`, the kernel's three sums and the column sums, from G made and consumed macro-tile by macro-tile."""
    x, y, (m, d), n = problem.x, problem.y, problem.x.shape, problem.y.shape[0]
    of_x, of_y = needs.x or 0, needs.y or 0
    new, need_g = problem.scale.new_zeros, of_x + of_y > 0
    dtype = gradient_dtype(x.dtype) if isinstance(statistic, Sigmoid) else x.dtype
    dx, dy = (x.new_empty((0,) if k is None else (k, d), dtype=dtype) for k in (needs.x, needs.y))
    sums, sum_col = new(3, dtype=torch.float64), new(n if needs.cols else 0)
    if not m or not n:
        return dx.zero_(), dy.zero_(), sums.float(), sum_col
    factor = problem.scale * unit
    with _on(x.device):
        call = _Call.of("gradient", problem, statistic)
        tile = call.tile
        height, width = plan.macro_tile(m, n, _workspace // x.element_size(), tile)
        workspace = x.new_empty(min(height, m) * plan.round_up(min(width, n), 16) if need_g else 0)
        sum_y = new((of_y, d))
        for i in range(0, m, height):
            r = slice(i, min(i + height, m))
            sum_x = new((max(min(r.stop, of_x) - i, 0), d))
            for j in range(0, n, width):
                c = slice(j, min(j + width, n))
                rows, cols = r.stop - r.start, c.stop - c.start
                stride = plan.round_up(cols, 16)
                g = workspace[: rows * stride].view(rows, stride)[:, :cols] if need_g else None
                blocks = plan.ceil(rows, tile.rows)
                programs = blocks * plan.ceil(cols, tile.cols)
                parts = new((3, programs)) if needs.sums else None
                col_parts = new((blocks, cols)) if needs.cols else None
                gradient_kernel[(programs,)](
                    *call.operands, *call.second, call.entries, row, col, *call.outputs(g), parts, col_parts,
                    (m, n, i, j, rows, cols, stride), call.pull, call.flags, call.d, call.shape, call.load,
                    **call.options,
                )  # fmt: skip
                if parts is not None:
                    sums += parts.sum(1, dtype=torch.float64)
                if col_parts is not None:
                    sum_col[c] += col_parts.sum(0)
                if g is not None and len(sum_x):
                    add_product(sum_x, g[: len(sum_x)], y[c])
                if g is not None and len(here := sum_y[c]):
                    add_product(here, g[:, : len(here)].T, x[r])
            if len(sum_x):
                torch.mul(sum_x, factor, out=dx[r])
        if needs.y is not None:
            torch.mul(sum_y, factor, out=dy)
    return dx, dy, (sums * unit).float(), sum_col * unit


@dataclass(frozen=True)
class _Call:
    """What every launch of a kernel on a problem shares."""

    tile: configs.Tile
    operands: tuple[Any, Any, Any]
    second: tuple[Any, Any]
    entries: tuple[Tensor | None, ...]
    flags: int
    d: tuple[int, int, int]
    tma: bool
    precision: str
    processors: int
    fold: Any
    pull: Any

    @classmethod
    def of(cls, kernel: str, p: Problem, statistic: Statistic | Sigmoid, places: Places | None = None) -> _Call:
        """Tile, operands and options, from the problem and the GPU at hand."""
        arch, processors = device()
        ids = p.row_id is not None and p.col_id is not None
        cheap = statistic.plain and not (ids and statistic.positive_ids)
        x, y = aligned(p.x), aligned(p.y)
        how, tma = precision(p.x.dtype), arch >= 90
        tile = configs.choose(kernel, arch, how, x.shape[1], _kind(kernel, statistic, ids, places))
        operands = tuple(
            operand(t, rows, tile.depth, tma) for t, rows in ((x, tile.rows), (y, tile.cols), (y, tile.piece))
        )
        second: tuple[Any, Any] = (None, None)
        depths = x.shape[1], 0, 1
        if statistic.second and p.teacher_x is not None and p.teacher_y is not None:
            tx, ty = aligned(p.teacher_x), aligned(p.teacher_y)
            second = operand(tx, tile.rows, tile.depth, tma), operand(ty, tile.piece, tile.depth, tma)
            depths = x.shape[1], tx.shape[1], p.layers
        flags = statistic.flags | IDS.value * ids
        if p.col_bias is not None:
            flags |= BIASED.value
        fold = pull = None
        if isinstance(statistic, (Softmax, Hinge, Sigmoid)):
            epilogue = statistic.epilogue
            fold, pull = (epilogue.FOLD, epilogue.PULL) if cheap else (epilogue.EXACT_FOLD, epilogue.EXACT_PULL)
            pull = (*pull, statistic.operands, not statistic.shift_invariant)
        entries = _entries(p, statistic)
        return cls(tile, operands, second, entries, flags, depths, tma, how, processors, fold, pull)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The tile's sizes."""
        return self.tile.rows, self.tile.cols, self.tile.depth, self.tile.piece

    @property
    def load(self) -> tuple[bool, str]:
        """How operands are read, and how fp32 is multiplied."""
        return self.tma, "ieee" if self.precision == "half" else self.precision

    @property
    def options(self) -> dict[str, Any]:
        """Launch options; fused multiply-add is what later Triton versions no longer take for granted."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    def outputs(self, g: Tensor | None) -> tuple[Any, Any]:
        """The workspace for tiles (which are written by halves), and for pieces."""
        if g is None or not self.tma:
            return g, g
        rows, wide = self.tile.rows, plan.half(self.tile.cols)
        return descriptor(g, rows, wide), descriptor(g, rows, self.tile.piece)


def _kind(kernel: str, statistic: Statistic | Sigmoid, ids: bool, places: Places | None) -> str:
    """Of its tiles in the table: by what may share an exponential, or else by how many registers are wanted."""
    width, fused = 0 if places is None else places.width, kernel == "fused"
    if width > MANY:
        return "crowded" if fused else "heavy"
    # beside a state more than eight places are an option like another, and the hardest negative is two
    names = ("teacher", "hardness", "hardest", *(("hardest",) if fused else ()))
    crowd = sum(getattr(statistic, name, False) for name in names) + (statistic.limit or statistic.guide)
    crowd += fused and width > MANY // 2
    if crowd > 1:
        return "crowded" if fused and crowd > 2 else "heavy"
    if kernel != "select" and statistic.plain and not (ids and statistic.positive_ids) and not crowd:
        return "ids" if ids else statistic.kind
    return "beside" if statistic.guide or statistic.margin else "exact"


def _entries(p: Problem, statistic: Statistic | Sigmoid) -> tuple[Tensor | None, ...]:
    """What `kernels/scores.py` looks up of rows, columns and the whole problem, in its order."""
    row_id, col_id = ranks(p.row_id, p.col_id) if p.row_id is not None and p.col_id is not None else (None, None)
    target = None if p.target is None else p.target.int()
    # the weights of a sweep are operands of its G
    factors = (None, None) if isinstance(statistic, Sigmoid) else (p.row_factor, p.col_factor)
    more = (None if t is None else t.contiguous() for t in (p.col_bias, p.row_limit, p.col_limit, p.numbers))
    return p.scale, p.bias, p.teacher_scale, target, row_id, col_id, *factors, *more


def _merge(parts: Tensor, state: Tensor, statistic: Statistic, fold: Any, onto: bool) -> None:
    count, _, length = parts.shape
    merge_kernel[(plan.ceil(length, MERGE_BLOCK),)](
        parts, state, count, length, state.stride(0), fold, statistic.flags, onto, MERGE_BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the features' device, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
