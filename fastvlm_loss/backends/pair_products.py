"""Products of a text with every patch of an image, for given pairs, in chunks: the patches are never there once a pair.

c_kp = <x_ip, y_t> of pair k = (i, t). A few pairs' patches are gathered at a time, and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHUNK", "gradient", "patches_of", "products", "rows_of"]

# numbers gathered at a time: 4 MB in fp32, which stay in cache, 64 MB on a GPU
CHUNK = {"cpu": 2**20, "cuda": 2**24}


def products(
    x: Tensor, y: Tensor, padding: Tensor | None, image: Tensor | None, text: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """c `[n, P]` in `dtype` for `x` `[B, P, D]` and `y` `[N, D]`; 0 where `padding` `[B, P]` is True.

    `image` and `text` `[n]` say whose; None takes each in order.
    """
    out = x.new_empty((x.shape[0] if image is None else image.shape[0], x.shape[1]), dtype=dtype)
    for part in _parts(x, out.shape[0]):
        patches, words = patches_of(x, padding, image, part, dtype), rows_of(y, text, part).to(dtype)
        out[part] = torch.bmm(patches, words[:, :, None])[:, :, 0]
    return out


def gradient(
    x: Tensor, y: Tensor, padding: Tensor | None, image: Tensor | None, text: Tensor | None, d: Tensor, need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `x` and `y`, in their dtypes, from that of c; empty if not needed."""
    if padding is not None:
        d = d.masked_fill(padding if image is None else padding[image], 0.0)
    dx = _of_patches(x, y, image, text, d) if need_x else x.new_empty(0)
    dy = _of_texts(x, y, padding, image, text, d) if need_y else y.new_empty(0)
    return dx, dy


def _of_patches(x: Tensor, y: Tensor, image: Tensor | None, text: Tensor | None, d: Tensor) -> Tensor:
    """sum over the pairs k of image i of d_kp y_t, `[B, P, D]`."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    (rows, tokens, width), n = x.shape, d.shape[0]
    if image is None:
        for part in _parts(x, n):
            dx[part] = d[part][:, :, None] * rows_of(y, text, part).to(d.dtype)[:, None, :]
        return dx
    if not n or not rows:
        return dx.zero_()
    # sums of sorted bags, not additions in place: no atomics, so the same bits from run to run
    first, order = _bags(image, rows)
    whose, table, d = order if text is None else text[order], y.to(d.dtype), d[order]
    step = min(max(CHUNK.get(x.device.type, CHUNK["cuda"]) // (rows * width), 1), max(tokens, 1))
    for p in range(0, tokens, step):
        weights = d[:, p : p + step].T
        count = weights.shape[0]
        offsets = first + n * torch.arange(count, device=x.device)[:, None]
        bags = F.embedding_bag(
            whose.repeat(count), table, offsets.flatten(), mode="sum", per_sample_weights=weights.flatten()
        )
        dx[:, p : p + step] = bags.view(count, rows, width).transpose(0, 1)
    return dx


def _of_texts(
    x: Tensor, y: Tensor, padding: Tensor | None, image: Tensor | None, text: Tensor | None, d: Tensor
) -> Tensor:
    """sum over the pairs k of text t of sum_p d_kp x_ip, `[N, D]`."""
    pulls = d.new_empty((d.shape[0], y.shape[1]))
    for part in _parts(x, d.shape[0]):
        patches = patches_of(x, padding, image, part, d.dtype)
        pulls[part] = torch.bmm(d[part][:, None, :], patches)[:, 0]
    if text is not None:
        if not d.shape[0]:
            return torch.zeros_like(y)
        first, order = _bags(text, y.shape[0])
        pulls = F.embedding_bag(order, pulls, first, mode="sum")
    return pulls.to(y.dtype)


def _parts(x: Tensor, n: int) -> Iterator[slice]:
    step = max(CHUNK.get(x.device.type, CHUNK["cuda"]) // max(x.shape[1] * x.shape[2], 1), 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def rows_of(table: Tensor, index: Tensor | None, part: slice) -> Tensor:
    """Of the pairs in `part`; an index of None takes each in order."""
    return table[part] if index is None else table.index_select(0, index[part])


def patches_of(x: Tensor, padding: Tensor | None, image: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    """`[pairs, P, D]` of the pairs in `part`, padding 0, whatever stands there."""
    patches = rows_of(x, image, part).to(dtype)
    return patches if padding is None else patches.masked_fill(rows_of(padding, image, part)[:, :, None], 0.0)


def _bags(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the bag of each of `size` places begins in the order that sorts `index`, and that order."""
    places, order = index.sort(stable=True)
    return torch.searchsorted(places, torch.arange(size, device=index.device)), order
