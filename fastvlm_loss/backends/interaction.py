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

# products held at a time, and a copy of them in backward: 4 MB each, which stay in cache, 64 MB on a GPU
TILE = {"cpu": 2**20, "cuda": 2**24}


def statistics(p: Interaction, statistic: Softmax) -> Tensor:
    """State `[fields, L]` of all rows (images), then all columns (texts)."""
    m, n = p.x.shape[0], p.y.shape[0]
    state = statistic.identity(p.x, p.pairs.scale.dtype, sum(statistic.lengths(m, n)))
    for r, c in _tiles(p):
        for half in _halves(p, statistic, _products(p, r, c), r, c):
            part = half.statistic.partial(half.bits, half.hit, None, None, half.index, 0.0, 1)
            state[:, half.place] = torch.stack(statistic.merge(state[:, half.place], part))
    return state


def gradient(
    p: Interaction, statistic: Softmax, operands: Tensor, need_x: bool, need_y: bool, need_x_weight: bool,
    need_y_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `x` and `y` (their dtype), of the weights, all empty if not needed, and of the scale."""
    scale = p.pairs.scale
    needs = need_x, need_y, need_x_weight, need_y_weight
    dx, dy, dx_weight, dy_weight = (
        t.new_zeros(t.shape if needed else (0,), dtype=scale.dtype)
        for t, needed in zip((p.x, p.y, p.x_weight, p.y_weight), needs, strict=True)
    )
    d_scale = scale.new_zeros(())
    for r, c in _tiles(p):
        x, y = (t.flatten(0, 1).to(scale.dtype) for t in (p.x[r], p.y[c]))
        for half in _halves(p, statistic, _products(p, r, c), r, c):
            g = half.gradient(operands)
            d_scale += (g * half.scores).sum()
            pull = (scale * g)[:, None, :]  # [own, 1, others]
            is_row = half.statistic.rows
            d_weight, at = (dx_weight, r) if is_row else (dy_weight, c)
            if d_weight.numel():
                d_weight[at] += (pull * half.best).sum(2)
            if need_x or need_y:
                index, weight = half.matches(), (pull * half.weight[:, :, None]).flatten(0, 1)
                if need_x:
                    part = _gathered(y, index, weight) if is_row else _scattered(y, index, weight, x.shape[0])
                    dx[r] += part.view(dx[r].shape)
                if need_y:
                    part = _scattered(x, index, weight, y.shape[0]) if is_row else _gathered(x, index, weight)
                    dy[c] += part.view(dy[c].shape)
    return dx.to(p.x.dtype), dy.to(p.y.dtype), dx_weight, dy_weight, d_scale


def dense(p: Interaction, statistic: Softmax, targets: Tensor | None) -> tuple[Tensor, ...]:
    """What `finish` returns, and the state: everything is one tile, differentiated by autograd. O(M N P T) memory."""
    r, c = slice(0, p.x.shape[0]), slice(0, p.y.shape[0])
    vectors, states = [], []
    for half in _halves(p, statistic, _products(p, r, c), r, c, differentiable=True):
        own = None if targets is None else targets[half.place]
        bits = half.bits
        if own is not None:  # a sample without target has no loss: keep its -inf out of autograd
            bits = torch.where((own > 0)[:, None], bits, 0.0)
        none = statistic.identity(p.x, p.pairs.scale.dtype, bits.shape[0])
        part = half.statistic.partial(bits, half.hit, None, None, half.index, 0.0, 1) if bits.shape[1] else none
        vectors.append(half.statistic.finish(torch.stack(list(part)), own, None))
        states.append(torch.stack(list(part)).detach())
    return (*(torch.cat(list(v)) for v in zip(*vectors, strict=True)), torch.cat(states, 1))


@dataclass(frozen=True)
class _Half:
    """A tile in one direction: a own sets choose among b others.

    Attributes:
        statistic: of this direction alone, as of rows.
        place: of the own sets in a state.
        products: `[a, own tokens, b, others' tokens]`, -inf where either is padding.
        top, best: `[a, own tokens, b]`, the best match of each token; `best` is 0 where there is none.
        weight: `[a, own tokens]`.
        scores: `[a, b]` without scale and bias, 0 for no candidate. `bits`: with them, in bits, -inf for no candidate.
        hit: bool `[a, b]`, targets. `index`: `[b]`, places of the others.
    """

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

    def gradient(self, operands: Tensor) -> Tensor:
        """dL / d(scale * scores + bias) `[a, b]`."""
        own = operands[:, self.place]
        return self.statistic.gradient(self.bits, self.bits, self.hit, None, own, own, 0.0)

    def matches(self) -> Tensor:
        """Whose best match it is, int32 `[a * own tokens, b]`: places among the b * tokens of the others."""
        tokens = self.products.shape[3]
        first = torch.arange(0, tokens * self.best.shape[2], tokens, device=self.best.device, dtype=torch.int32)
        return (_lowest(self.products, self.top) + first).flatten(0, 1)


def _halves(
    p: Interaction, statistic: Softmax, products: Tensor, r: slice, c: slice, differentiable: bool = False
) -> Iterator[_Half]:
    """The directions asked for, of the tile of images `r` and texts `c`."""
    rows = statistic.lengths(p.x.shape[0], 0)[0]
    hit, out = _entries(p.pairs, statistic, r, c)
    sides = [(products, p.x_weight[r], p.x_padding, p.y_padding, r, c, hit, out)] if statistic.rows else []
    if statistic.cols:
        outs = None if out is None else out.T
        turned = products.permute(2, 3, 0, 1)
        sides.append((turned, p.y_weight[c], p.y_padding, p.x_padding, c, r, hit.T, outs))
    for k, (tile, weight, padding, other, own, others, target, without) in enumerate(sides):
        is_row = statistic.rows and k == 0
        # the direction's own statistic counts it as rows; which it is, `rows` and `cols` still say
        alone = replace(statistic, rows=is_row, cols=not is_row)
        place = own if is_row else slice(rows + own.start, rows + own.stop)
        top = tile.max(3).values if differentiable else tile.amax(3)
        best = top
        if padding is not None:
            best = best.masked_fill(padding[own][:, :, None], 0.0)
        if other is not None:
            best = best.masked_fill(other[others].all(1), 0.0)
        scores = (weight[:, :, None] * best).sum(1)
        bits = scores * (p.pairs.scale / LN2)
        if p.pairs.bias is not None:
            bits = bits + p.pairs.bias / LN2
        if without is not None:
            scores, bits = scores.masked_fill(without, 0.0), bits.masked_fill(without, -torch.inf)
        index = torch.arange(others.start, others.stop, device=tile.device, dtype=bits.dtype)
        yield _Half(alone, place, tile, top, best, weight, scores, bits, target, index)


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
    if p.y_padding is not None:
        products = products.masked_fill(p.y_padding[c], -torch.inf)
    if p.x_padding is not None:
        products = products.masked_fill(p.x_padding[r][:, :, None, None], -torch.inf)
    return products


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


def _lowest(values: Tensor, top: Tensor) -> Tensor:
    """Lowest index, int32, of the maximum `top` of `values` along the last axis."""
    # elementwise and a maximum of floats: 3 to 6 times as fast as an argmax on a CPU. NaN has the sign 0, so index 0
    length = values.shape[-1]
    place = torch.arange(length, device=values.device, dtype=values.dtype)
    below = (values - top[..., None]).sign_()  # 0 where it is the maximum, else -1
    return below.mul_(length).sub_(place).amax(-1).neg_().to(torch.int32)


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
