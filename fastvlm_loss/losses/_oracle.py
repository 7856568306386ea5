"""What the oracles share, by plain PyTorch on the dense score matrix; and option values to try."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.filters import Filter
from ._spec import Learned

__all__ = [
    "TOKENS", "all_targets", "cross_entropy", "entries", "log_sum", "matrix", "mean_of", "sides_of", "some_bias",
    "some_ids", "some_relevance", "some_targets", "some_teacher", "some_teacher_weight", "some_text_relevance",
    "some_token_options", "some_tokens", "some_weights",
]  # fmt: skip

TOKENS = (5, 3)  # P and T of token sets to try
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


def cross_entropy(z: Tensor, targets: Tensor, live: Tensor, eps: float) -> Tensor:
    """Of each row, its mass spread evenly over its targets, `eps` of it over all its candidates."""
    q = (1 - eps) * targets.to(z.dtype) / targets.sum(1, keepdim=True).clamp(min=1)
    q = q + eps * live.to(z.dtype) / live.sum(1, keepdim=True).clamp(min=1)
    return log_sum(z, live) - (q * z).sum(1)


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


def some_relevance(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """A relevance above 0 of every image `[M]`."""
    return torch.rand(m, generator=g).add(0.05).to(device)


def some_text_relevance(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """Likewise of every text `[N]`."""
    return some_relevance(n, n, device, g)


def all_targets(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """A word of N for every token `[M]`."""
    return torch.randint(0, n, (m,), generator=g).to(device)


def some_targets(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """Likewise, a fifth of them ignored."""
    targets = all_targets(m, n, torch.device("cpu"), g)
    return targets.masked_fill(torch.rand(m, generator=g) < 0.2, -100).to(device)


def some_tokens(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """A caption `[M]`, its last quarter padding of id 0."""
    tokens = torch.randint(0, n, (m,), generator=g)
    tokens[m - m // 4 :] = 0
    return tokens.to(device)


def some_bias(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """A bias of every word `[N]`."""
    return torch.randn(n, generator=g).to(device)


def some_teacher(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    """A teacher's state of every token `[M, D / 2]`."""
    return torch.randn(m, max(d // 2, 1), generator=g, dtype=torch.float64).to(device)


def some_teacher_weight(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    """The head of that teacher `[N, D / 2]`."""
    return some_teacher(n, n, device, g, d).div(max(d // 2, 1) ** 0.5)


def some_token_options() -> tuple[dict[str, Any], dict[str, Any]]:
    """Masks and learned relevance of the tokens of images `[M, P]` and texts `[N, T]`, P and T those of TOKENS."""

    def of(side: int, make: Callable[[int, int, torch.Generator], Tensor]) -> Callable[..., Tensor]:
        return lambda m, n, device, g: make((m, n)[side], TOKENS[side], g).to(device)

    def mask(rows: int, tokens: int, g: torch.Generator) -> Tensor:
        # tokens at the front; about one row in eight has none
        return torch.arange(tokens) < torch.randint(-1, 3 * tokens // 2, (rows, 1), generator=g)

    def relevance(rows: int, tokens: int, g: torch.Generator) -> Tensor:
        return torch.rand(rows, tokens, generator=g).add(0.05)

    sides = list(enumerate(("image", "text")))
    masks = {f"{side}_mask": of(k, mask) for k, side in sides}
    return masks, {f"{side}_relevance": Learned(of(k, relevance)) for k, side in sides}
