"""Late interaction in chunked PyTorch: tiles of pairs of token sets, on any device and in any dtype.

A tile is one product of all tokens of a few images with those of a few texts. It is folded at once: the best matches of
every token, weighted, are the scores of its pairs, and those go into the statistics. In backward the product is made
again, and each best match takes its gradient by index; the tile of gradients, one entry in T and one in P not 0, is
never made. So two products in all, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.interaction import Interaction
from ..scores.problem import Problem
from ..scores.statistics import LN2, Softmax

__all__ = ["TILE", "dense", "gradient", "statistics"]

# products held at a time, and a copy of them in backward: 16 MB each, and 64 MB on a GPU
TILE = {"cpu": 2**22, "cuda": 2**24}


def statistics(p: Interaction, statistic: Softmax) -> Tensor:
    """State `[fields, L]` of all rows (images), then all columns (texts)."""
    state = statistic.identity(p.x, p.pairs.scale.dtype, sum(statistic.lengths(p.x.shape[0], p.y.shape[0])))
    for tile in _tiles(p):
        for half in _halves(p, statistic, tile):
            state[:, half.place] = torch.stack(statistic.merge(state[:, half.place], half.partial(half.bits)))
    return state


def gradient(
    p: Interaction, statistic: Softmax, operands: Tensor, need_x: bool, need_y: bool, need_x_weight: bool,
    need_y_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `x` and `y` (in their dtype) and of the weights, empty if not needed, and of the scale."""
    scale, needs = p.pairs.scale, (need_x, need_y, need_x_weight, need_y_weight)
    dx, dy, dx_weight, dy_weight = (
        t.new_zeros(t.shape if needed else (0,), dtype=scale.dtype)
        for t, needed in zip((p.x, p.y, p.x_weight, p.y_weight), needs, strict=True)
    )
    d_scale, d_tokens, d_weights = scale.new_zeros(()), (dx, dy), (dx_weight, dy_weight)
    for tile in _tiles(p):
        tokens = [t[part].flatten(0, 1).to(scale.dtype) for t, part in zip((p.x, p.y), tile, strict=True)]
        for half in _halves(p, statistic, tile):
            g = half.gradient(operands)
            d_scale += (g * half.scores).sum()
            pull = (scale * g)[:, None, :]
            own, other = half.side, 1 - half.side
            if needs[2 + own]:
                d_weights[own][tile[own]] += (pull * half.best).sum(2)
            if need_x or need_y:
                index, weight = half.matches(), (pull * half.weight[:, :, None]).flatten(0, 1)
            if needs[own]:
                part = _gathered(tokens[other], index, weight)
                d_tokens[own][tile[own]] += part.unflatten(0, half.weight.shape)
            if needs[other]:
                part = _scattered(tokens[own], index, weight, tokens[other].shape[0])
                d_tokens[other][tile[other]] += part.unflatten(0, half.products.shape[2:])
    return dx.to(p.x.dtype), dy.to(p.y.dtype), dx_weight, dy_weight, d_scale


def dense(p: Interaction, statistic: Softmax, targets: Tensor | None) -> tuple[Tensor, ...]:
    """What `finish` returns, and the state: everything is one tile, differentiated by autograd. O(M N P T) memory."""
    vectors, states = [], []
    for half in _halves(p, statistic, (slice(0, p.x.shape[0]), slice(0, p.y.shape[0])), differentiable=True):
        own, bits = None if targets is None else targets[half.place], half.bits
        if own is not None:  # a sample without target has no loss: keep its -inf out of autograd
            bits = torch.where((own > 0)[:, None], bits, 0.0)
        vectors.append(half.statistic.finish(torch.stack(half.partial(bits)), own, None))
        states.append(torch.stack(half.partial(half.bits.detach())))
    return (*(torch.cat(v) for v in zip(*vectors, strict=True)), torch.cat(states, 1))


@dataclass(frozen=True)
class _Half:
    """One direction of a tile: a own samples choose among b others.

    Attributes:
        side: 0 if images choose, 1 if texts do. Here they are the rows either way, so of `statistic` too.
        place: of the own samples in a state.
        products: `[a, own tokens, b, others' tokens]`, -inf where either is padding.
        top, best: `[a, own tokens, b]`, the best match of each token; in `best` 0 where there is none.
        weight: `[a, own tokens]`.
        scores: `[a, b]` without scale and bias, 0 for no candidate. `bits`: with them, in bits, -inf for no candidate.
        hit: bool `[a, b]`, targets. `index`: `[b]`, places of the others.
    """

    side: int
    statistic: Softmax
    place: slice
    products: Tensor
    top: Tensor
    best: Tensor
    weight: Tensor
    scores: Tensor
    bits: Tensor
    hit: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, side: int, p: Interaction, statistic: Softmax, place: slice, products: Tensor, top: Tensor, own: slice,
        others: slice, hit: Tensor, out: Tensor | None,
    ) -> _Half:  # fmt: skip
        """Of an interaction whose `x` are the own samples."""
        best, weight = top, p.x_weight[own]
        if p.x_padding is not None:
            best = best.masked_fill(p.x_padding[own][:, :, None], 0.0)
        if p.y_padding is not None:
            best = best.masked_fill(p.y_padding[others].all(1), 0.0)
        scores = (weight[:, :, None] * best).sum(1)
        bits = scores * (p.pairs.scale / LN2)
        if p.pairs.bias is not None:
            bits = bits + p.pairs.bias / LN2
        if out is not None:
            scores, bits = scores.masked_fill(out, 0.0), bits.masked_fill(out, -torch.inf)
        index = torch.arange(others.start, others.stop, device=bits.device, dtype=bits.dtype)
        alone = replace(statistic, rows=True, cols=False)
        return cls(side, alone, place, products, top, best, weight, scores, bits, hit, index)

    def partial(self, bits: Tensor) -> tuple[Tensor, ...]:
        """State of these scores."""
        if not bits.shape[1]:
            return tuple(self.statistic.identity(bits, bits.dtype, bits.shape[0]))
        return self.statistic.partial(bits, self.hit, None, None, self.index, 0.0, 1)

    def gradient(self, operands: Tensor) -> Tensor:
        """dL / d(scale * scores + bias) `[a, b]`."""
        own = operands[:, self.place]
        return self.statistic.gradient(self.bits, self.bits, self.hit, None, own, own, 0.0)

    def matches(self) -> Tensor:
        """Whose best match it is, int32 `[a * own tokens, b]`: places among the b * tokens of the others."""
        others, tokens = self.products.shape[2:]
        first = torch.arange(0, others * tokens, tokens, device=self.top.device, dtype=torch.int32)
        return (_lowest(self.products, self.top) + first).flatten(0, 1)


def _halves(
    p: Interaction, statistic: Softmax, tile: tuple[slice, slice], differentiable: bool = False
) -> Iterator[_Half]:
    """The directions asked for, of the tile of some images and texts."""
    (r, c), rows = tile, statistic.lengths(p.x.shape[0], 0)[0]
    products, (hit, out) = _products(p, r, c), _entries(p.pairs, statistic, r, c)

    def top(products: Tensor) -> Tensor:
        return products.max(3).values if differentiable else _largest(products)

    if statistic.rows:
        yield _Half.of(0, p, statistic, r, products, top(products), r, c, hit, out)
    if statistic.cols:
        place, products = slice(rows + c.start, rows + c.stop), products.permute(2, 3, 0, 1)
        out = None if out is None else out.T
        yield _Half.of(1, p.turned(), statistic, place, products, top(products), c, r, hit.T, out)


def _tiles(p: Interaction) -> Iterator[tuple[slice, slice]]:
    (m, tokens, _), (n, others, _) = p.x.shape, p.y.shape
    cells = TILE.get(p.x.device.type, TILE["cuda"])
    rows = min(max(round(cells**0.5 / tokens), 1), max(m, 1))
    cols = min(max(cells // (rows * tokens * others), 1), max(n, 1))
    rows = max(cells // (cols * tokens * others), 1)
    for c in range(0, n, cols):
        for r in range(0, m, rows):
            yield slice(r, min(r + rows, m)), slice(c, min(c + cols, n))


def _products(p: Interaction, r: slice, c: slice) -> Tensor:
    """Of the tokens of the images `r` and the texts `c`, `[images, P, texts, T]`, -inf where either is padding."""
    x, y = (t.to(p.pairs.scale.dtype) for t in (p.x[r], p.y[c]))
    products = (x.flatten(0, 1) @ y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])
    # added, not filled: ten times as fast. Padding is 0, so are its products
    if p.y_padding is not None:
        products += _floor(p.y_padding[c], products.dtype)
    if p.x_padding is not None:
        products += _floor(p.x_padding[r], products.dtype)[:, :, None, None]
    return products


def _floor(padding: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, -torch.inf)


def _entries(pairs: Problem, statistic: Softmax, r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
    """Which pairs are targets, and which are no candidates (None: all are)."""
    cols = torch.arange(c.start, c.stop, device=pairs.x.device)
    rows = torch.arange(r.start, r.stop, device=pairs.x.device) if pairs.target is None else pairs.target[r]
    hit = rows[:, None] == cols
    if pairs.row_id is None or pairs.col_id is None:
        return hit, None
    row, col = pairs.row_id[r][:, None], pairs.col_id[c]
    absent, same = (row == -1) | (col == -1), row == col
    if statistic.positive_ids:
        return (hit | same) & ~absent, absent
    return hit, absent | (same & ~hit)


def _largest(values: Tensor) -> Tensor:
    """Maximum along the last axis."""
    # in the memory order of `values`: 30 times as fast where that is not the order of its axes
    return torch.amax(values, -1, out=torch.empty_like(values[..., 0]))


def _lowest(values: Tensor, top: Tensor) -> Tensor:
    """Lowest index, int32, of the maximum `top` of `values` along the last axis."""
    # elementwise and a maximum of floats: 3 to 6 times as fast as an argmax on a CPU. NaN has the sign 0, so index 0
    length = values.shape[-1]
    place = torch.arange(length, device=values.device, dtype=values.dtype)
    below = (values - top[..., None]).sign_()  # 0 where it is the maximum, else -1
    return _largest(below.mul_(length).sub_(place)).neg_().to(torch.int32)


def _gathered(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum_k weight_rk table[index_rk] `[rows, D]`, for index and weight `[rows, k]`."""
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _scattered(table: Tensor, index: Tensor, weight: Tensor, size: int) -> Tensor:
    """sum over index_rk = s of weight_rk table[r] `[size, D]`, for index and weight `[rows, k]`."""
    # by sorting, not by adding in place: no atomics, so the same bits from run to run
    places, order = index.flatten().sort(stable=True)
    starts = torch.searchsorted(places, torch.arange(size, device=index.device, dtype=places.dtype))
    weight = weight.flatten()[order]
    return F.embedding_bag(order // index.shape[1], table, starts, per_sample_weights=weight, mode="sum")
