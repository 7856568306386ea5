"""Selection of k candidates of each row and column: the law of their keys, and the monoid of the largest.

The key of an entry is sharpness * <x_i, y_j>, with noise plus a Gumbel number: the largest k keys are then a draw
without replacement with probabilities in proportion to exp(sharpness * <x_i, y_j>) (Gumbel-top-k: Kool et al. 2019).
With a floor f it is log(softmax + f) instead, with the log-sum-exp of the row or column given. Keys are fp32, whatever
the features; a product that is not finite is no candidate's.

The noise of entry (i, j) is a function of (seed, step, i, j, direction) alone: word 2 (i mod 2) + direction of Philox
at counter (j, i div 2, step), keyed by the seed. One call serves two rows and both directions.

Keys are compared as one int64, `order`: the bits of the fp32 key, made monotonic, above those of (2^32 - 1 - index). So
the order is total: equal keys go to the lowest index, whatever was looked at first, and the largest k of a union are a
merge. Nobody is `NOBODY`. The state is (order, product), each `[L, k]`, rows first and then columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import WORD, gumbel, philox

__all__ = ["MOST", "NOBODY", "Selection", "index_of", "join"]

NOBODY = -(2**63)
MOST = 64  # candidates of a row or column


@dataclass(frozen=True)
class Selection:
    """How many, and by which law; ready for a backend.

    Attributes:
        k: how many, at most `MOST`.
        noise: whether keys have Gumbel noise.
        law: fp32 `[2]`: sharpness and floor (0 for none).
        totals: fp32 `[L]`, log-sum-exp of sharpness * <x, y> of each row and column, or None without a floor.
        place: int64 `[4]`: seed, step, and the global indices of row 0 and column 0.
    """

    k: int
    noise: bool
    law: Tensor
    totals: Tensor | None
    place: Tensor

    def noise_of(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor | None]:
        """The Gumbel numbers of one tile as its rows and as its columns meet them, or None."""
        if not self.noise:
            return None, None
        seed, step, first_row, first_col = self.place.unbind()
        i = first_row + torch.arange(rows.start, rows.stop, device=self.place.device)
        j = first_col + torch.arange(cols.start, cols.stop, device=self.place.device)
        pair = (i[:1] >> 1) + torch.arange(i.shape[0] // 2 + 1, device=i.device)  # without waiting for their number
        counter = (j[None, :] & WORD, pair[:, None] & WORD, step & WORD, step >> 32 & WORD)
        words = philox(counter, (seed & WORD, seed >> 32 & WORD))
        odd, mine = (i & 1 == 1)[:, None], (i >> 1) - (i[:1] >> 1)
        to_row, to_col = (gumbel(torch.where(odd, words[2 + d][mine], words[d][mine])) for d in (0, 1))
        return to_row, to_col

    def of_tile(
        self, products: Tensor, live: Tensor, noise: Tensor | None, first: int, axis: int, totals: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """State of one tile along `axis`, in which its places begin at `first`, of the candidates that are `live`."""
        products = products.float()
        keys = products * self.law[0]
        if totals is not None:
            keys = torch.logaddexp(keys - totals.float().unsqueeze(axis), self.law[1].log())
        if noise is not None:
            keys = keys + noise
        index = torch.arange(first, first + products.shape[axis], device=products.device) + self.place[2 + axis]
        order = _order(keys, index.unsqueeze(1 - axis), live & products.isfinite())
        return join((order.movedim(axis, 1), products.movedim(axis, 1)), None, self.k)

    def empty(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """State of no candidates at all."""
        order = torch.full((length, self.k), NOBODY, dtype=torch.int64, device=like.device)
        return order, torch.zeros((length, self.k), dtype=torch.float32, device=like.device)


def _order(keys: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """The total order of keys; one that is not finite is no candidate's."""
    bits = (keys + 0.0).view(torch.int32)  # + 0.0: there is one zero
    monotonic = (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(torch.int64)
    return torch.where(live & keys.isfinite(), monotonic << 32 | (WORD - index), NOBODY)


def index_of(order: Tensor) -> Tensor:
    """Global index of each, -1 for nobody."""
    return torch.where(order == NOBODY, -1, WORD - (order & WORD))


def join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the union of two disjoint states, in order; of one if `b` is None."""
    order, product = a if b is None else (torch.cat([x, y], 1) for x, y in zip(a, b, strict=True))
    best = order.topk(min(k, order.shape[1]), 1)
    product = product.gather(1, best.indices)
    missing = k - best.values.shape[1]
    order = F.pad(best.values, (0, missing), value=NOBODY)
    return order, torch.where(order == NOBODY, 0.0, F.pad(product, (0, missing)))
