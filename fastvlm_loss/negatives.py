"""Hard negatives for image-text matching, picked in a stream: no M x N matrix, of scores or of noise.

key_ij = hardness * scale * <x_i, y_j> + Gumbel noise; the k largest keys of each row are its negative texts, those of
each column its negative images. See docs/negatives.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .distributed import eager_in_group, shard_of
from .engine import tile
from .queue import FeatureQueue
from .scores import check
from .scores.filters import Filter, filtered
from .scores.negatives import HardNegatives, Hardness, Law, LinearHardness, finite_rows
from .scores.problem import Problem
from .scores.selection import Selection

__all__ = ["HardNegatives", "LinearHardness", "hard_negatives"]

Queues = FeatureQueue | tuple[FeatureQueue | None, FeatureQueue | None]
State = tuple[Tensor, Tensor]


@eager_in_group
@torch.no_grad()
def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    k: int = 1,
    *,
    hardness: Hardness = 1.0,
    scale: Tensor | float = 1 / 0.07,
    floor: float = 0.0,
    labels: Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    filters: Filter | Sequence[Filter] | None = None,
    queue: Queues | None = None,
    seed: int | None = None,
    step: int | Tensor | None = None,
    group: object = None,
    check_finite: bool = False,
) -> HardNegatives:
    """For each image k negative texts and for each text k negative images, in one pass that stores no scores.

    Drawn without replacement with probabilities in proportion to exp(hardness * scale * <x_i, y_j>), exactly, or with
    hardness=inf the k largest. Never the positive, an equal id, or an entry with NaN. The same draw for any tiling,
    number of threads, device: a function of (seed, step) and of the place in the batch. No gradient; on a GPU nothing
    waits.

    Args:
        image_features, text_features: floating `[M, D]` and `[N, D]`, usually of unit length.
        k: negatives of each, 1 to 64.
        hardness: 0 uniform, 1 the law of ALBEF, inf deterministic; or a schedule, a function of the step
            (`LinearHardness`). Ties of equal keys go to the lowest index.
        scale: of the products, a positive number or tensor `[]`. Fixed by default: with the learned logit_scale, which
            grows sevenfold in training, the same hardness ends as nearly deterministic.
        floor: added to each probability, as of BLIP (1e-4): a mixture with the uniform draw. Costs a second pass.
        labels: int `[M]`, the text of each image (-1 for none); needed if M != N, else the text of the same index.
        image_ids, text_ids: int `[M]`, `[N]`; equal ids are no negatives, -1 takes an entry out. One alone serves both.
        filters: of `fastvlm_loss.filters`: look-alikes of the positive are no negatives.
        queue: a `FeatureQueue` of texts, or a pair of them (of images, of texts): its entries are candidates too, at
            indices from N (of texts) and M (of images) on.
        seed, step: ints >= 0 (`step` also an int64 tensor `[]`); not needed for hardness=inf.
        group: None, a process group or a `DeviceMesh` dimension: the candidates are those of all its processes, in the
            order of their ranks, and so are the indices; ids, labels (indices in that order), k, seed, step and the law
            are the same everywhere. Returned are the negatives of the own images and texts.
        check_finite: whether NaN or infinity in the features raises instead of being left out.

    Returns:
        `HardNegatives`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Li et al. 2021 (ALBEF), section 3.2; Kool et al. 2019 (Gumbel-top-k); Salmon et al. 2011 (Philox).
    """
    law = Law.of(k, hardness, scale, floor, seed, step)
    of_images, of_texts = _queues(queue)
    any_queue = of_images if of_texts is None else of_texts
    given = [t is None for t in (labels, image_ids, text_ids, filters)]
    told = given, k, law.hardness, floor, seed, [q and q.size for q in (of_images, of_texts)]
    problem = Problem.of(
        image_features, text_features, 1.0, labels=labels, image_ids=image_ids, text_ids=text_ids,
        check_finite=check.flag("check_finite", check_finite),
        sharding=None if group is None else lambda x, y: shard_of(group, x, y, told),
    )  # fmt: skip
    if any_queue is not None and problem.row_id is None and labels is None:
        ids = any_queue.own_ids(problem.m)
        problem = replace(problem, row_id=ids, col_id=ids.clone())
    whole = filtered(problem, filters)
    m, n = whole.m, whole.n
    for name, found in (("images", of_images), ("texts", of_texts)):
        if found is not None:
            _check_queue(name, found, whole, step)
    selection = law.selection(whole)
    rows = cols = None
    if floor:
        totals = _totals(whole, selection)
        selection = replace(selection, totals=totals)
        rows, cols = totals[:m], totals[m:]
    order, best = tile.select(whole, selection)
    own, own_rows, own_cols = whole.x.shape[0], whole.own_rows, whole.own_cols  # of a group's
    to_row, to_col = (order[:own], best[:own]), (order[own:], best[own:])
    if of_texts is not None:
        more = _beside(whole, of_texts, step, own_rows, rows=True)
        beside = replace(law.selection(more, own_rows.start, n), totals=None if rows is None else rows[own_rows])
        to_row = law.join(to_row, tile.select(more, beside, cols=False))
    if of_images is not None:
        more = _beside(whole, of_images, step, own_cols, rows=False)
        beside = replace(law.selection(more, m, own_cols.start), totals=None if cols is None else cols[own_cols])
        to_col = law.join(to_col, tile.select(more, beside, rows=False))
    return law.result(to_row, to_col, problem)


def _totals(p: Problem, selection: Selection) -> Tensor:
    """Log-sum-exp `[M + N]` of the law's scores over the candidates and positives with finite features; 0 of none."""
    finite = finite_rows(p.x), finite_rows(p.y)
    x, y = (t.masked_fill(~f[:, None], 0.0) for t, f in zip((p.x, p.y), finite, strict=True))
    rows, cols = p.of_rows(finite[0]), p.of_cols(finite[1])
    if p.row_id is None or p.col_id is None:  # ids that equal none
        row_id, col_id = (torch.arange(len(f), device=f.device) + at for f, at in ((rows, 0), (cols, p.m)))
    else:
        row_id, col_id = p.row_id, p.col_id
    row_id, col_id = row_id.masked_fill(~rows, -1), col_id.masked_fill(~cols, -1)
    scores = replace(p, x=x, y=y, scale=selection.law[0].to(p.scale.dtype), row_id=row_id, col_id=col_id)
    lse = tile.softmax(scores).summary["lse"].float()
    return torch.where(lse.isfinite(), lse, 0.0)


def _queues(queue: object) -> tuple[FeatureQueue | None, FeatureQueue | None]:
    if queue is None or isinstance(queue, FeatureQueue):
        return None, queue
    if isinstance(queue, tuple) and len(queue) == 2 and all(q is None or isinstance(q, FeatureQueue) for q in queue):
        return queue
    raise TypeError(
        f"queue: got {type(queue).__name__}, wanted a FeatureQueue of texts, or a pair (of images, of texts)"
    )


def _check_queue(name: str, queue: FeatureQueue, p: Problem, step: int | Tensor | None) -> None:
    if p.row_id is None:
        raise ValueError(f"image_ids: got None beside a queue of {name} and labels, wanted ids of images and texts")
    if queue.dim != p.x.shape[1]:
        raise ValueError(f"queue: got {name} of D = {queue.dim}, wanted {p.x.shape[1]}")
    if p.second:
        raise ValueError(f"filters: got a guide beside a queue of {name}, which has no features of the guide")
    if step is None and (queue.start_step or queue.max_age is not None):
        raise ValueError(f"step: got None beside a queue of {name} with an age or a start, wanted the current step")


def _beside(p: Problem, queue: FeatureQueue, step: int | Tensor | None, own: slice, rows: bool) -> Problem:
    """The own rows of a problem with the queue as columns, or its own columns with the queue as rows; no targets."""
    assert p.row_id is not None and p.col_id is not None
    features, ids = queue.features.to(p.x.dtype), queue.valid_ids(step)
    count = p.x.shape[0] if rows else len(ids)
    none = torch.full((count,), -1, dtype=torch.int64, device=p.x.device)
    unlimited = None if p.row_limit is None else p.row_limit.new_full((2, len(ids)), torch.inf)
    limit = p.row_limit if rows else p.col_limit
    limit, ours = None if limit is None else limit[:, own].contiguous(), (p.row_id if rows else p.col_id)[own]
    p = replace(p, target=none, shard=None)
    if rows:
        return replace(p, y=features, row_id=ours, col_id=ids, row_limit=limit, col_limit=unlimited)
    return replace(p, x=features, row_id=ids, col_id=ours, row_limit=unlimited, col_limit=limit)
