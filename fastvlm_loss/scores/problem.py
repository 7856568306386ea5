"""`Problem`: a score matrix s_ij = scale * <x_i, y_j> + bias as a value that is never stored.

The one place for validation, dtype, autocast and contiguity. Everything below it may rely on what is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import check
from .appended import learned_rows
from .shard import Shard
from .travel import picked

__all__ = ["FIELDS", "Problem", "statistics_dtype"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, accumulators and losses are fp32; fp64 features keep fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Features, scale, bias, targets and ids of one score matrix, checked and ready for a backend.

    Attributes:
        x: image features `[M, D]`, contiguous, in the dtype the products run in.
        y: text features `[N, D]`, likewise.
        scale: multiplicative alpha `[]`, fp32 (fp64 for fp64 features), with gradient.
        bias: additive bias `[]` or None, likewise.
        target: column of each row's positive `[M]` int64, -1 for none; None means row i has column i.
        row_id, col_id: int64 `[M]` and `[N]`, or None. Equal ids leave the candidates unless they are the
            target; -1 is never a candidate. (For a statistic with `positive_ids` equal ids are targets instead.)
        row_factor, col_factor: `[M]` and `[N]` or None, a factor of every row's and column's scores (softmax) or
            losses (sigmoid), or its threshold (hinge), with gradient where the statistic has one.
        teacher_x, teacher_y, teacher_scale: `[M, E]`, `[N, E]` and `[]` of a second score matrix, or None: the
            teacher's (with gradient), the guide's of a filter, or the similarity that a margin follows. A margin's may
            have several rows for each of x, `[layers M, E]`, row k M + i the k-th of x_i: the largest product counts.
        col_bias: `[N]` or None, added to every score of a column, with gradient.
        row_limit, col_limit: `[2, M]` and `[2, N]` or None. A negative leaves the candidates of a row (column) if its
            product <x_i, y_j> is above the first limit or its second product above the second.
        numbers: `[2]` or None: how hard negatives are weighted; or of a margin its most, and its size at a similarity
            of 0, from which the second score is subtracted.
        second: what the second score matrix is for: "teacher", "guide", "margin" or "" (travels in the flags).
        shard: None, or the place of this process in a group: the features are its own then, and M and N in all other
            fields the group's.
        learned: how many first rows and columns have features with a gradient; None for all.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None = None
    target: Tensor | None = None
    row_id: Tensor | None = None
    col_id: Tensor | None = None
    row_factor: Tensor | None = None
    col_factor: Tensor | None = None
    teacher_x: Tensor | None = None
    teacher_y: Tensor | None = None
    teacher_scale: Tensor | None = None
    col_bias: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None
    numbers: Tensor | None = None
    second: str = ""
    shard: Shard | None = None
    learned: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        labels: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        check_finite: bool = False,
        names: tuple[str, str, str] = ("image_features", "text_features", "labels"),
        sharding: Callable[[Tensor, Tensor], Shard | None] | None = None,
    ) -> Problem:
        """Check the public arguments, by the `names` they have there, and bring them to the engine's form.

        `sharding` finds the place of checked features in a group.
        """
        x = _autocast(check.features(names[0], image_features))
        y = _autocast(check.features(names[1], text_features))
        check.alike(names[1], y, names[0], x)
        dtype = statistics_dtype(x.dtype)
        scale = check.scalar("logit_scale", logit_scale, x, dtype, positive=True)
        bias = None if logit_bias is None else check.scalar("logit_bias", logit_bias, x, dtype)
        shard = None if sharding is None else sharding(x, y)
        target = _target(names[2], labels, x, y, check_finite, shard)
        if labels is not None and (image_ids is None) != (text_ids is None):
            missing = "image_ids" if image_ids is None else "text_ids"
            raise ValueError(f"{missing}: got None beside labels, wanted ids of both images and texts")
        row_id, col_id = _ids(image_ids, text_ids, x, y)
        if shard is not None and row_id is not None and col_id is not None:
            row_id, col_id = shard.gather_rows(row_id), shard.gather_cols(col_id)
        if row_id is not None and col_id is not None:
            target = _without_invalid(target, row_id, col_id)
        if check_finite:
            check.finite(names[0], x)
            check.finite(names[1], y)
            check.finite("logit_scale", scale)
            if bias is not None:
                check.finite("logit_bias", bias)
        x, y = x.contiguous(), y.contiguous()
        # of a group each process has rows to append, so what needs no gradient stands between what does
        rows = learned_rows(image_features), learned_rows(text_features)
        learned = rows if shard is None and rows != (x.shape[0], y.shape[0]) else None
        return cls(x, _distinct(y, x), scale, bias, target, row_id, col_id, shard=shard, learned=learned)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Any]) -> Problem:
        """What `tensors` lists."""
        return cls(*tensors)

    @property
    def m(self) -> int:
        """Rows of the score matrix, those of other processes included."""
        return self.x.shape[0] if self.shard is None else sum(self.shard.rows)

    @property
    def n(self) -> int:
        """Columns, likewise."""
        return self.y.shape[0] if self.shard is None else sum(self.shard.cols)

    @property
    def layers(self) -> int:
        """How many rows of `teacher_x` each row of x has."""
        rows = self.x.shape[0]
        return 1 if self.teacher_x is None or not rows else self.teacher_x.shape[0] // rows

    @property
    def own_rows(self) -> slice:
        """Of all rows those of this process."""
        return slice(0, self.m) if self.shard is None else self.shard.own_rows

    @property
    def own_cols(self) -> slice:
        """Of all columns, likewise."""
        return slice(0, self.n) if self.shard is None else self.shard.own_cols

    def of_rows(self, own: Tensor) -> Tensor:
        """Something of each row: of all rows, differentiably."""
        return own if self.shard is None else self.shard.gather_rows(own)

    def of_cols(self, own: Tensor) -> Tensor:
        """Something of each column: of all columns, differentiably."""
        return own if self.shard is None else self.shard.gather_cols(own)

    def picked_cols(self, own: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of something `[own columns, ...]` of all columns, 0 for a negative index; no gradient."""
        if self.shard is not None and self.shard.ring:
            return picked(own, index, self.shard.cols, self.shard)
        rows = self.of_cols(own)[index.clamp(min=0)]
        return rows.masked_fill((index < 0).reshape(-1, *[1] * (own.dim() - 1)), 0.0)

    def sampled_cols(self, own: Tensor, most: int) -> Tensor:
        """At most `most` evenly spaced rows of something of all columns; no gradient."""
        at = torch.linspace(0, max(self.n - 1, 0), min(self.n, most), device=own.device).round().long()
        if self.shard is None:
            return own[at]
        places = at.tolist()  # of the sizes alone, so they are the same everywhere
        shares = [
            [i for i in places if cols.start <= i < cols.stop]
            for cols in map(self.shard.cols_of, range(self.shard.world))
        ]
        mine = own[[i - self.own_cols.start for i in shares[self.shard.rank]]]
        return self.shard.collectives.gather(mine, tuple(map(len, shares)))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order, as they travel through the op boundary."""
        return tuple(vars(self).values())[:FIELDS]

    def weighted(self, image_factors: Tensor | None, text_factors: Tensor | None) -> Problem:
        """The same with a factor for each row `[M]` and column `[N]`; ones for None."""
        m, n, dtype = self.m, self.n, self.scale.dtype
        row, col = (
            self.x.new_ones(length, dtype=dtype) if v is None else check.vector(name, v, length, self.x, dtype)
            for name, v, length in (("image_factors", image_factors, m), ("text_factors", text_factors, n))
        )
        return replace(self, row_factor=row.contiguous(), col_factor=_distinct(col.contiguous(), row))

    def tempered_rows(self, factors: Tensor) -> Problem:
        """The problem of the scores factors_i * s_ij, for rows and columns alike; 16-bit features become fp32.

        Scale and bias go into the features, <(factor scale x, factor bias), (y, 1)>, and get their gradients there.
        """
        dtype = self.scale.dtype
        if self.shard is not None:
            factors = self.shard.collectives.own(factors, self.shard.rows)
        x, y = factors[:, None] * (self.scale * self.x.to(dtype)), self.y.to(dtype)
        if self.bias is not None:
            x = torch.cat([x, (factors * self.bias)[:, None]], 1)
            y = F.pad(y, (0, 1), value=1.0)
        return replace(  # factors, scale and bias have a gradient by every row
            self, x=x.contiguous(), y=_distinct(y.contiguous(), x), scale=torch.ones_like(self.scale), bias=None,
            learned=None,
        )  # fmt: skip

    def taught(self, teacher_image_features: Tensor, teacher_text_features: Tensor, teacher_scale: Any) -> Problem:
        """The same with a teacher's score matrix."""
        names = "teacher_image_features", "teacher_text_features", "teacher_scale"
        return self.beside(
            "teacher", names, teacher_image_features, teacher_text_features, teacher_scale, self.x.shape[0]
        )

    def beside(self, role: str, names: tuple[str, str, str], x: Tensor, y: Tensor, scale: Any, m: int) -> Problem:
        """The same with a second score matrix in a role; `names` of its arguments, `m` its number of rows.

        Raises:
            ValueError: there is one already, in another role.
        """
        if self.second:
            raise ValueError(f"{names[0]}: got a {role} beside a {self.second}, wanted one second score matrix at most")
        x, y = (_autocast(check.features(name, t)) for name, t in zip(names, (x, y), strict=False))
        check.alike(names[1], y, names[0], x)
        for name, t, rows in ((names[0], x, m), (names[1], y, self.y.shape[0])):
            if t.shape[0] != rows or t.dtype != self.x.dtype or t.device != self.x.device:
                raise ValueError(
                    f"{name}: got {t.dtype} {list(t.shape)} on {t.device}, "
                    f"wanted {rows} rows of {self.x.dtype} on {self.x.device} as the features"
                )
        scale = check.scalar(names[2], scale, self.x, self.scale.dtype, positive=True)
        x, y = x.contiguous(), y.contiguous()
        for own in (self.x, self.y):
            x, y = _distinct(x, own), _distinct(y, own)
        return replace(self, teacher_x=x, teacher_y=_distinct(y, x), teacher_scale=scale, second=role)

    def swapped(self) -> Problem:
        """The teacher's problem, with this one as its teacher; a bias changes neither's softmax."""
        assert self.teacher_x is not None and self.teacher_y is not None and self.teacher_scale is not None
        rows, cols = (None if limit is None else limit.flip(0) for limit in (self.row_limit, self.col_limit))
        return replace(
            self, x=self.teacher_x, y=self.teacher_y, scale=self.teacher_scale, bias=None, teacher_x=self.x,
            teacher_y=self.y, teacher_scale=self.scale, col_bias=None, row_limit=rows, col_limit=cols, learned=None,
        )  # fmt: skip

    def positives(self) -> tuple[Tensor | None, Tensor | None]:
        """As `targets`, where equal ids are targets too."""
        if self.row_id is None or self.col_id is None:
            return self.targets()
        rows, cols = _matches(self.row_id, self.col_id), _matches(self.col_id, self.row_id)
        n, dtype = self.n, self.scale.dtype
        target = torch.arange(self.m, device=self.x.device) if self.target is None else self.target
        if n:  # a target of another id counts once more
            apart = (target >= 0) & (self.col_id[target.clamp(min=0)] != self.row_id)
            rows, cols = rows + apart, cols.index_add(0, target.clamp(min=0), apart.to(cols.dtype))
        return rows.to(dtype), cols.to(dtype)

    def targets(self) -> tuple[Tensor | None, Tensor | None]:
        """How many targets each row `[M]` and column `[N]` has, or None where each has exactly one."""
        if self.target is None:
            return None, None
        rows = (self.target >= 0).to(self.scale.dtype)
        cols = rows.new_zeros(self.n)
        return rows, cols.index_add(0, self.target.clamp(min=0), rows) if cols.shape[0] else cols


FIELDS = len(fields(Problem)) - 3  # tensors that travel through the op boundary


def _matches(ids: Tensor, others: Tensor) -> Tensor:
    """How many of the `others` equal each id; -1 equals none."""
    ordered = others.sort().values
    found = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return found.masked_fill(ids == -1, 0)


def _autocast(features: Tensor) -> Tensor:
    # features follow autocast as the operands of any matmul do; the statistics stay fp32
    kind = features.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        return features.to(torch.get_autocast_dtype(kind))
    return features


def _target(
    name: str, labels: Tensor | None, x: Tensor, y: Tensor, check_values: bool, shard: Shard | None = None
) -> Tensor | None:
    m, n = x.shape[0], y.shape[0] if shard is None else sum(shard.cols)
    if labels is None:
        if m != y.shape[0] if shard is None else shard.rows != shard.cols:
            raise ValueError(
                f"{name}: got None for {m} image and {y.shape[0]} text features, wanted the text of each image [{m}]"
            )
        return None
    target = check.integers(name, labels, m, x)
    if shard is not None:
        target, m = shard.gather_rows(target), sum(shard.rows)
    inside = ((target >= -1) & (target < n)).all() if m else None
    of = "text indices" if name == "labels" else "indices"
    wanted = (
        f"wanted {of} in [0, {n}), or {'-1 for an image without text' if name == 'labels' else 'the one to ignore'}"
    )
    if inside is None:
        return target
    if torch.compiler.is_compiling() or (target.is_cuda and not check_values):
        torch._assert_async(inside, f"{name}: out of range, {wanted}")  # no synchronisation
    elif x.device.type == "meta" or is_fake(inside):
        pass  # no values to check
    elif not bool(inside):
        bad = int(((target < -1) | (target >= n)).int().argmax())
        raise ValueError(f"{name}: got {int(target[bad])} at index {bad}, {wanted}")
    return target


def _ids(
    image_ids: Tensor | None, text_ids: Tensor | None, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if image_ids is None and text_ids is None:
        return None, None
    m, n = x.shape[0], y.shape[0]
    row_id = None if image_ids is None else check.integers("image_ids", image_ids, m, x)
    col_id = None if text_ids is None else check.integers("text_ids", text_ids, n, x)
    if row_id is not None and col_id is not None:
        return row_id, _distinct(col_id, row_id)
    if m != n:
        missing = "image_ids" if row_id is None else "text_ids"
        raise ValueError(f"{missing}: got None for {m} image and {n} text features, wanted ids of both")
    shared = col_id if row_id is None else row_id
    assert shared is not None
    return shared, _distinct(shared, shared)


def _distinct(tensor: Tensor, other: Tensor) -> Tensor:
    # one tensor in two places of an autograd Function cannot be traced by torch.compile
    return tensor.view_as(tensor) if tensor is other else tensor


def _without_invalid(target: Tensor | None, row_id: Tensor, col_id: Tensor) -> Tensor:
    # an id of -1 is no candidate, so it is nobody's positive and has none
    if target is None:
        target = torch.arange(row_id.shape[0], device=row_id.device)
    if not col_id.shape[0]:
        return target
    invalid = (row_id == -1) | (col_id[target.clamp(min=0)] == -1)
    return target.masked_fill(invalid, -1)
