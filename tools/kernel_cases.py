"""The calls whose kernels ship: every statistic, target, dtype and class of widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fastvlm_loss.engine.ops import GRADIENT, SELECT, STATISTICS, SWEEP
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Candidates, Hinge, Softmax

from .devices import DEVICES

__all__ = ["Case", "problem", "select", "shipped", "step", "sweep"]


@dataclass(frozen=True)
class Case:
    """A call whose kernels the report compiles.

    Attributes:
        name: what is called, for people and for `-k`.
        call: the call, on CPU tensors; it may launch several kernels.
        archs: the architectures it is for.
        loads: how operands should arrive where that is not the device's best way: "cp.async" for pointers.
        products: the instruction that products should be where that is not the device's best, for instance "fma".
    """

    name: str
    call: Callable[[], object] = field(repr=False)
    archs: tuple[int, ...] = tuple(DEVICES)
    loads: str | None = None
    products: str | None = None


def problem(
    m: int, n: int, d: int, dtype: torch.dtype = torch.bfloat16, targets: str = "paired", bias: bool = False
) -> Problem:
    """A problem without values; `targets` is "paired" (M = N), "labels", or "ids" (labels as well if M != N)."""
    x, y = torch.zeros(m, d, dtype=dtype), torch.zeros(n, d, dtype=dtype)
    labels = torch.zeros(m, dtype=torch.int64) if targets == "labels" or m != n else None
    rows, cols = (torch.arange(m), torch.arange(n)) if targets == "ids" else (None, None)
    return Problem.of(x, y, 1.0, 0.0 if bias else None, labels=labels, image_ids=rows, text_ids=cols)


def with_options(
    given: Problem, statistic: Softmax | Hinge | Candidates, biased: bool = False, layers: int = 1
) -> Problem:  # fmt: skip
    """The problem with what a statistic wants of it, and with `biased` a bias of each column."""
    m, n = given.x.shape[0], given.y.shape[0]
    if statistic.factor:
        given = given.weighted(None, None)
    if statistic.second:
        given = given.beside("teacher", ("", "", ""), given.x.repeat(layers, 1), given.y, 1.0, layers * m)
    if statistic.limit or statistic.guide:
        given = replace(given, row_limit=torch.zeros(2, m), col_limit=torch.zeros(2, n))
    if statistic.margin or getattr(statistic, "hardness", False):
        given = replace(given, numbers=torch.zeros(2))
    return replace(given, col_bias=torch.zeros(n)) if biased else given


def step(
    given: Problem, statistic: Softmax | Hinge, needs: tuple[bool, bool, bool] = (True, True, True),
    biased: bool = False, layers: int = 1,
) -> None:  # fmt: skip
    """Forward and backward of a statistic through the operators, with the options it wants from the problem.

    `needs` says which of the features and the scale want a gradient; without any there is no backward. With a teacher
    backward includes its gradient, with `biased` that of the columns' bias; `layers` are the captions of an image.
    """
    given = with_options(given, statistic, biased, layers)
    counts = given.positives() if statistic.positive_ids else given.targets()
    sides = zip(counts, (statistic.rows, statistic.cols), strict=True)
    present = [count for count, wanted in sides if wanted and count is not None]
    targets = torch.cat(present) if present else None
    how = statistic.name, statistic.flags
    nll, gap, state, products = STATISTICS["triton"](*given.tensors(), targets, *how, False)
    if any(needs):
        d_gap = gap if gap.numel() else None
        GRADIENT["triton"](*given.tensors(), targets, state, products, nll, d_gap, *how, *needs, biased)
        if isinstance(statistic, Softmax) and statistic.teacher:
            swapped = statistic.swap()
            how = swapped.name, swapped.flags
            GRADIENT["triton"](*given.swapped().tensors(), targets, state, products, nll, d_gap, *how, *needs, False)


def sweep(given: Problem, needs: tuple[bool, bool, bool] = (True, True, True), weighted: bool = False) -> None:
    """The sigmoid loss and its gradients through the operator, with weights of rows and columns or without."""
    SWEEP["triton"](*(given.weighted(None, None) if weighted else given).tensors(), *needs)


def select(
    given: Problem, k: int, noise: bool = True, floor: bool = False,
    statistic: Softmax | Hinge | Candidates | None = None,
) -> None:  # fmt: skip
    """The k best candidates of each row and column through the operator, alone or beside a statistic."""
    statistic = statistic or Candidates()
    given = with_options(given, statistic)
    length = sum(statistic.lengths(given.x.shape[0], given.y.shape[0]))
    how = statistic.name, statistic.flags, False, k, noise, torch.ones(2)
    SELECT["triton"](
        *given.tensors(), None, *how, torch.zeros(length) if floor else None, torch.zeros(4, dtype=torch.int64)
    )


# with every option apart and together, as far as the epilogues distinguish them
OPTIONS = {
    "plain": Softmax(),
    "smoothed": Softmax(gap=True),
    "taught": Softmax(gap=True, teacher=True),
    "tempered": Softmax(factor=True),
    "tempered smoothed": Softmax(gap=True, factor=True),
    "tempered taught": Softmax(gap=True, teacher=True, factor=True),
}
TARGETS = ("paired", "labels", "ids")
# what a torch.set_float32_matmul_precision makes of fp32
PRECISIONS = {"highest": "fp32", "high": "tf32x3", "medium": "tf32"}
# the rest of the family, with the targets that each is for
FAMILY = {
    "out": (Softmax(positives="out"), ("ids",)),
    "out smoothed": (Softmax(positives="out", gap=True), ("ids",)),
    "in": (Softmax(positives="in"), ("ids",)),
    "hard": (Softmax(hardness=True), ("paired", "ids")),
    "hinge": (Hinge(), ("paired", "ids")),
    "margin": (Softmax(margin=True), ("paired", "ids")),
    "margin smoothed": (Softmax(margin=True, gap=True), ("labels",)),
    "limit": (Softmax(limit=True), ("paired", "ids")),
    "limit smoothed": (Softmax(limit=True, gap=True), ("labels",)),
    "guide": (Softmax(limit=True, guide=True), ("paired", "ids")),
    "guide smoothed": (Softmax(limit=True, guide=True, gap=True), ("ids",)),
    "limit taught": (Softmax(limit=True, teacher=True), ("ids",)),
    "limit hinge": (Hinge(limit=True), ("labels",)),
    "guide hinge": (Hinge(limit=True, guide=True), ("ids",)),
    "limit hard": (Softmax(hardness=True, limit=True), ("labels",)),
    "guide hard": (Softmax(hardness=True, limit=True, guide=True), ("ids",)),
    "hardest": (Softmax(hardest=True), ("paired", "ids")),
    "hardest smoothed": (Softmax(hardest=True, gap=True), ("labels",)),
    "hardest taught": (Softmax(hardest=True, teacher=True), ("ids",)),
    "hardest in": (Softmax(hardest=True, positives="in"), ("ids",)),
    "hardest hinge": (Hinge(hardest=True), ("paired", "ids")),
    "hardest hard": (Softmax(hardest=True, hardness=True), ("ids",)),
    "hardest guide": (Softmax(hardest=True, limit=True, guide=True), ("ids",)),
    "hardest margin": (Softmax(hardest=True, margin=True), ("ids",)),
}
# what a loss with negatives asks for, plain and with as much as the kinds of tiles are made for
BESIDE = {
    "plain": (Softmax(), "paired"),
    "ids": (Softmax(), "ids"),
    "smoothed": (Softmax(gap=True), "ids"),
    "tempered taught": (Softmax(teacher=True, factor=True), "ids"),
    "in": (Softmax(positives="in"), "ids"),
    "hard": (Softmax(hardness=True), "ids"),
    "hinge": (Hinge(), "ids"),
    "limit": (Softmax(limit=True, gap=True), "ids"),
    "guide": (Softmax(limit=True, guide=True, gap=True), "ids"),
    "hardest": (Softmax(hardest=True, gap=True), "ids"),
    "guide hard": (Softmax(hardness=True, limit=True, guide=True), "ids"),
}
ONE_WAY = ("in", "hard", "hinge", "margin", "guide", "hardest hinge")  # the largest of each kind, along rows alone


def shipped() -> list[Case]:
    """All of them: bf16 in every way at a common width, then the other dtypes and widths in the main ways."""
    return [*_common(), *_family(), *_selections(), *_beside(), *_dtypes(), *_widths(), *_partial()]


def _common() -> Iterator[Case]:
    for targets in TARGETS:
        given = problem(512, 512, 768, targets=targets)
        for name, both in OPTIONS.items():
            if targets == "labels" and name not in ("plain", "smoothed"):
                continue  # which differ from pairs by one vector of targets
            yield Case(f"{name} {targets} bf16 768", partial(step, given, both))
            sides = ("rows", "cols") if name in ("plain", "smoothed") else ("rows",)
            for side in sides[: 2 if targets == "ids" else 1]:
                one = replace(both, rows=side == "rows", cols=side == "cols")
                yield Case(f"{name} {side} {targets} bf16 768", partial(step, given, one))
        yield Case(f"sigmoid {targets} bf16 768", partial(sweep, _biased(given)))
        yield Case(f"sigmoid weighted {targets} bf16 768", partial(sweep, _biased(given), weighted=True))


def _family() -> Iterator[Case]:
    for name, (statistic, several) in FAMILY.items():
        for targets in several:
            given = problem(512, 512, 768, targets=targets)
            yield Case(f"{name} {targets} bf16 768", partial(step, given, statistic))
            if name in ONE_WAY and targets == several[-1]:
                yield Case(f"{name} rows {targets} bf16 768", partial(step, given, replace(statistic, cols=False)))
    captions = problem(512, 512, 768), Softmax(margin=True)
    yield Case("margin of 3 captions paired bf16 768", partial(step, *captions, layers=3))
    rows = Softmax(cols=False)
    for name, statistic in {"plain": rows, "smoothed": replace(rows, gap=True)}.items():  # a vocabulary's bias
        given = problem(512, 512, 768, targets="labels")
        yield Case(f"{name} rows labels biased bf16 768", partial(step, given, statistic, biased=True))


def _selections() -> Iterator[Case]:
    for targets in TARGETS:
        given = problem(512, 512, 768, targets=targets)
        for k in (1, 8, 64) if targets == "ids" else (8,):
            for noise in (True, False):
                kind = "drawn" if noise else "largest"
                yield Case(f"{kind} {k} {targets} bf16 768", partial(select, given, k, noise))
    given = problem(512, 512, 768, targets="ids")
    yield Case("drawn 8 above a floor ids bf16 768", partial(select, given, 8, floor=True))
    for name, rule in {"limit": Candidates(limit=True), "guide": Candidates(limit=True, guide=True)}.items():
        yield Case(f"drawn 8 {name} ids bf16 768", partial(select, given, 8, statistic=rule))
    for side in ("rows", "cols"):
        one = Candidates(rows=side == "rows", cols=side == "cols")
        yield Case(f"drawn 8 {side} labels bf16 768", partial(select, problem(512, 700, 768), 8, statistic=one))
    yield Case("drawn 8 ids fp16 768", partial(select, problem(512, 512, 768, torch.float16, "ids"), 8))
    full = problem(512, 512, 768, torch.float32, "ids")
    for setting, how in PRECISIONS.items():
        products = "fma" if how == "fp32" else None
        yield Case(
            f"drawn 8 ids {how} 768", partial(_with_precision, setting, partial(select, full, 8)), products=products
        )


def _beside() -> Iterator[Case]:
    """A loss and its negatives in one pass; two calls in bf16, the others in fp16, whose kernels are alike."""
    for name, (statistic, targets) in BESIDE.items():
        half = torch.bfloat16 if name in ("plain", "guide") else torch.float16
        ways = (half, 8, True), (torch.float16, 16, True), (torch.float16, 8, False)
        for dtype, k, noise in ways[:: 2 if name in ("hardest", "guide hard") else 1]:  # which with 16 are too much
            said = f"{'drawn' if noise else 'largest'} {k} beside {name}"
            call = partial(select, problem(512, 512, 768, dtype, targets), k, noise, statistic=statistic)
            yield Case(f"{said} {targets} {'fp16' if dtype == torch.float16 else 'bf16'} 768", call)
    given = problem(512, 512, 768, torch.float16)
    yield Case("drawn 1 beside plain paired fp16 768", partial(select, given, 1, statistic=Softmax()))
    one = partial(select, given, 8, statistic=Softmax(cols=False))
    yield Case("drawn 8 beside plain rows paired fp16 768", one)
    full = problem(512, 512, 768, torch.float32, "ids")
    for setting in ("highest", "medium"):
        how = PRECISIONS[setting]
        for name in ("plain", "guide hard"):
            call = partial(_with_precision, setting, partial(select, full, 8, statistic=BESIDE[name][0]))
            yield Case(f"drawn 8 beside {name} ids {how} 768", call, products="fma" if how == "fp32" else None)


def _dtypes() -> Iterator[Case]:
    for targets in ("paired", "ids"):
        half = problem(512, 512, 768, torch.float16, targets)
        for name in ("plain", "smoothed", "taught", "tempered"):
            yield Case(f"{name} {targets} fp16 768", partial(step, half, OPTIONS[name]))
        yield Case(f"sigmoid {targets} fp16 768", partial(sweep, _biased(half)))
        full = problem(512, 512, 768, torch.float32, targets)
        for setting, how in PRECISIONS.items():
            products = "fma" if how == "fp32" else None
            for name in ("plain", "smoothed", "taught"):
                call = partial(_with_precision, setting, partial(step, full, OPTIONS[name]))
                yield Case(f"{name} {targets} {how} 768", call, products=products)
            call = partial(_with_precision, setting, partial(sweep, _biased(full)))
            yield Case(f"sigmoid {targets} {how} 768", call, products=products)


def _widths() -> Iterator[Case]:
    for d in (16, 64, 100, 512, 1024):
        given = problem(512, 512, d)
        for name in ("plain", "smoothed") if d in (16, 100, 1024) else ("plain",):
            yield Case(f"{name} paired bf16 {d}", partial(step, given, OPTIONS[name]))
        yield Case(f"sigmoid paired bf16 {d}", partial(sweep, _biased(given)))


def _partial() -> Iterator[Case]:
    for name, (m, n) in {"ragged": (300, 517), "one row": (1, 512), "one": (1, 1)}.items():
        given = problem(m, n, 768)
        yield Case(f"plain {name} bf16 768", partial(step, given, Softmax()))
        yield Case(f"sigmoid {name} bf16 768", partial(sweep, _biased(given)))
    given = problem(512, 512, 768, bias=True)
    for name, needs in {"scale frozen": (True, True, False), "scale alone": (False, False, True)}.items():
        yield Case(f"plain {name} bf16 768", partial(step, given, Softmax(), needs))
    yield Case("sigmoid value alone bf16 768", partial(sweep, given, (False, False, False)))


def _biased(given: Problem) -> Problem:
    return replace(given, bias=torch.zeros(()))  # the sigmoid loss has one


def _with_precision(setting: str, call: Callable[[], Tensor | None]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        call()
    finally:
        torch.set_float32_matmul_precision(before)
