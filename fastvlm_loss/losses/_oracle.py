"""What the oracles share, by plain PyTorch on the dense score matrix; and option values to try."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.filters import Filter

__all__ = ["entries", "log_sum", "matrix", "mean_of", "sides_of", "some_ids", "some_weights"]

Side = tuple[Tensor, Tensor, Tensor]  # scores, which are targets, which are candidates


def matrix(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, normalize: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Products and scores of every entry `[M, N]`."""
    if normalize:
        image_features, text_features = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    c = image_features @ text_features.T
    return c, logit_scale * c + (0.0 if logit_bias is None else logit_bias)


def entries(
    c: Tensor, labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every entry: whether it is the labelled pair, whether it takes part, and equal ids."""
    m, n = c.shape
    y = (torch.arange(m, device=c.device) if labels is None else labels)[:, None] == torch.arange(n, device=c.device)
    row_id, col_id = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    if row_id is None or col_id is None:
        return y, torch.ones_like(y), torch.zeros_like(y)
    present = (row_id != -1)[:, None] & (col_id != -1)
    return y & present, present, (row_id[:, None] == col_id) & present


def sides_of(
    s: Tensor, y: Tensor, live: Tensor, c: Tensor | None = None, filters: Filter | None = None
) -> tuple[Side, Side]:
    """Rows and columns, without the candidates that an absolute filter on the products `c` takes out."""
    if c is None or filters is None:
        return (s, y, live), (s.T, y.T, live.T)
    assert filters.rule == "absolute"
    best = torch.where(y, c, -torch.inf)
    row, col = (c > best.amax(axis, keepdim=True) + filters.value for axis in (1, 0))
    return (s, y, live & (y | ~row)), (s.T, y.T, (live & (y | ~col)).T)


def log_sum(z: Tensor, of: Tensor) -> Tensor:
    """Log-sum-exp of these entries of each row, 0 where there is none."""
    some = of.any(1, keepdim=True)
    return torch.where(some[:, 0], torch.where(some, z, 0.0).masked_fill(~(of | ~some), -torch.inf).logsumexp(1), 0.0)


def mean_of(
    losses: Callable[[Tensor, Tensor, Tensor], Tensor], sides: Iterable[Side],
    weights: tuple[Tensor | None, Tensor | None] = (None, None), directions: str = "both", reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """`losses` of every row with a target, weighted and reduced, over the directions."""
    results = []
    for (z, y, live), w, name in zip(sides, weights, ("image", "text"), strict=True):
        if directions in ("both", name):
            w = y.any(1).to(z.dtype) * (1.0 if w is None else w)
            each = w * losses(z, y, live)
            mean = each.sum() / torch.where(w.sum() == 0, 1.0, w.sum())
            results.append({"none": each, "sum": each.sum(), "mean": mean}[reduction])
    return results[0] if len(results) == 1 else (results[0] + results[1]) / 2


def some_ids(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """Ids `[M]` of a variant: each about twice, a tenth of them -1."""
    ids = torch.randint(0, max(m // 2, 1), (m,), generator=g)
    return ids.masked_fill(torch.rand(m, generator=g) < 0.1, -1).to(device)


def some_weights(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """Weights `[M]` of a variant, a fifth of them 0."""
    return torch.rand(m, generator=g).mul(2).masked_fill(torch.rand(m, generator=g) < 0.2, 0.0).to(device)
