"""A cross-batch queue: features of past batches as further negatives (MoCo, XBM, ALBEF)."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import eager_in_group, shard_of
from .scores import check
from .scores.appended import appended
from .scores.shard import own_of

__all__ = ["FeatureQueue"]

OWN = -(2**62)  # ids below it are the queue's own, so that features without ids equal nobody


class FeatureQueue(torch.nn.Module):
    """The last `size` features, first in, first out; as buffers, so that a checkpoint holds and resumes them.

    Past features are columns of the image direction (a queue of texts) or of the text direction (a queue of images):
    two calls of one direction each, as of ALBEF,

        texts, text_ids = text_queue.extend(text_features, ids)
        to_text = clip_loss(image_features, texts, scale, labels=torch.arange(len(image_features)),
                            image_ids=ids, text_ids=text_ids, directions="image")

    and with images likewise, `directions="text"`, the queue's images having the label -1 (`labels` does that). Slots
    that are not filled, or too old, have the id -1 and are no candidates. Features in the queue have no gradient,
    and no product makes one of what `extend` has put there, if the loss gets what it returned as it is: asked for the
    gradient of the extended tensor itself, backward gives 0 behind the batch. In a group, or in a compiled loss, it is
    made and dropped.

    In a group of processes each has the whole queue, and all push alike, with `group=`: what is pushed is the batch of
    all. To a loss with `group=` each process brings its own samples and an equal part of the slots: by
    `text_queue.extend(text_features, ids, group=group)` with the labels `text_queue.places(len(text_features),
    group=group)`, by `image_queue.labels(len(image_features), group=group)` for the other direction, and by
    `own_ids(len(image_features), group=group)` where there are no ids.

    Args:
        size: slots.
        dim: D of the features.
        dtype: they are kept in; bf16 halves the memory of fp32.
        max_age: steps after which an entry is no candidate; None keeps all.
        start_step: before this step nothing is a candidate: features drift fast in the beginning.
        payload: shape and dtype of what each entry brings along beside its features, for instance
            `((77,), torch.int64)` for the tokens of a text, which the fusion encoder encodes anew.
        device: of the buffers.

    Raises:
        TypeError, ValueError: named.

    Source: He et al. 2020 (MoCo), section 3.2; Wang et al. 2020 (XBM), section 3.2; Li et al. 2021 (ALBEF), 3.2.
    """

    features: Tensor
    ids: Tensor
    steps: Tensor
    cursor: Tensor
    pushed: Tensor
    payload: Tensor | None

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, max_age: int | None = None,
        start_step: int = 0, payload: tuple[tuple[int, ...], torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.dim = check.whole("size", size, low=1), check.whole("dim", dim, low=1)
        self.max_age = None if max_age is None else check.whole("max_age", max_age, low=0)
        self.start_step = check.whole("start_step", start_step, low=0)
        if dtype not in check.DTYPES:
            raise TypeError(f"dtype: got {dtype}, wanted float64, float32, bfloat16 or float16")
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("steps", torch.zeros(size, dtype=torch.int64, device=device))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))
        if payload is not None:
            pair = payload if isinstance(payload, tuple) and len(payload) == 2 else (None, None)
            good = isinstance(pair[0], (tuple, list)) and all(isinstance(s, int) and s >= 0 for s in pair[0])
            if not good or not isinstance(pair[1], torch.dtype):
                raise TypeError(f"payload: got {payload!r}, wanted a pair of shape and dtype, as ((77,), torch.int64)")
        empty = None if payload is None else torch.zeros((size, *payload[0]), dtype=payload[1], device=device)
        self.register_buffer("payload", empty)

    @eager_in_group
    @torch.no_grad()
    def push(
        self, features: Tensor, ids: Tensor | None = None, step: int | Tensor = 0, payload: Tensor | None = None, *,
        group: object = None,
    ) -> None:  # fmt: skip
        """Store a batch of any size; of one larger than the queue its last features stay.

        Args:
            features: floating `[B, D]`, detached here.
            ids: int `[B]`, or None for features that equal nobody's; -1 stores an entry that is no candidate.
            step: when they were made, for `max_age`.
            payload: `[B, ...]` of the shape and dtype that the queue was made for, detached here.
            group: None, or a process group or `DeviceMesh` dimension, as of the losses: what all its processes give is
                stored, in the order of their ranks, in each.
        """
        x = check.features("features", features)
        if x.shape[1] != self.dim:
            raise ValueError(f"features: got {list(x.shape)}, wanted [B, {self.dim}]")
        if x.device != self.features.device:
            raise ValueError(f"features: got a tensor on {x.device}, wanted {self.features.device}")
        count = x.shape[0]
        new = None if ids is None else check.integers("ids", ids, count, x)
        if not isinstance(step, Tensor):
            check.whole("step", step)
        if self.payload is None and payload is not None:
            raise ValueError("payload: got a tensor, wanted None: the queue was made without")
        if self.payload is not None:
            wanted = count, *self.payload.shape[1:]
            if payload is None or payload.shape != wanted or payload.dtype != self.payload.dtype:
                got = "None" if payload is None else f"{payload.dtype} {list(payload.shape)}"
                raise ValueError(f"payload: got {got}, wanted {self.payload.dtype} {list(wanted)}")
        x = x.to(self.features.dtype)
        if group is not None:
            shard = shard_of(group, x, x, "push", self.size, ids is None, payload is None)
            x, count = shard.gather_rows(x), sum(shard.rows)
            new = None if new is None else shard.gather_rows(new)
            payload = None if payload is None else shard.gather_rows(payload)
        if new is None:
            new = OWN - 1 - self.pushed - torch.arange(count, device=x.device)
        stay = min(count, self.size)
        slot = (self.cursor + count - stay + torch.arange(stay, device=x.device)) % self.size
        self.features[slot] = x[count - stay :]
        self.ids[slot] = new[count - stay :]
        if self.payload is not None and payload is not None:
            self.payload[slot] = payload[count - stay :].detach()
        made = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=x.device)
        self.steps[slot] = made.to(x.device, torch.int64)
        self.cursor.copy_((self.cursor + count) % self.size)
        self.pushed.add_(count)

    def valid_ids(self, step: int | Tensor | None = None) -> Tensor:
        """Ids `[size]` of the slots; -1 where there is nothing or, given the current `step`, too early or too old."""
        if step is None:
            return self.ids.clone()
        out = self.ids == -1 if self.max_age is None else self.steps < step - self.max_age
        if isinstance(step, Tensor):
            return self.ids.masked_fill(out | (step < self.start_step), -1)
        return torch.full_like(self.ids, -1) if step < self.start_step else self.ids.masked_fill(out, -1)

    @eager_in_group
    def extend(
        self, features: Tensor, ids: Tensor | None = None, step: int | Tensor | None = None, *, group: object = None
    ) -> tuple[Tensor, Tensor]:
        """The batch's features and ids, and behind them the queue's: `[B + size, D]` and `[B + size]`.

        Args:
            features: floating `[B, D]`; their gradient stays.
            ids: int `[B]`; None gives each one that equals nobody's. Use the same for the other side's anchors: what
                equals an anchor's id is no negative of it.
            step: the current one, for `max_age`.
            group: None, or a group: instead of the whole queue an equal part of its slots, which those of the other
                processes complete.
        """
        x = check.features("features", features)
        if x.shape[1] != self.dim:
            raise ValueError(f"features: got {list(x.shape)}, wanted [B, {self.dim}]")
        part, first = self._part(x.shape[0], group, ids is None)
        own = self.own_ids(x.shape[0]) + first if ids is None else check.integers("ids", ids, x.shape[0], x)
        return appended(x, self.features[part].to(x.dtype)), torch.cat([own, self.valid_ids(step)[part]])

    @eager_in_group
    def own_ids(self, count: int, *, group: object = None) -> Tensor:
        """Ids `[count]` for a batch without any: they equal nobody's, as long as they are not pushed themselves."""
        return torch.arange(count, device=self.ids.device) + (OWN + 1 + self._part(count, group)[1])

    @eager_in_group
    def places(self, count: int, *, group: object = None) -> Tensor:
        """Where `[count]` the batch of `extend` stands: labels of images whose texts it is."""
        part, first = self._part(count, group)
        return torch.arange(count, device=self.ids.device).add(first + part.start)

    def gather(self, values: Tensor, index: Tensor) -> Tensor:
        """What the indices of `hard_negatives(..., queue=self)` stand for: of the batch, and behind it of the queue.

        Args:
            values: `[B, ...]` of the batch, of the shape and dtype of the payload.
            index: int `[...]` in [0, B + size); -1 gives the first of the batch, to be left out by its weight.

        Returns:
            `[*index.shape, ...]`, with the gradient of `values`.
        """
        if self.payload is None:
            raise ValueError("gather: the queue was made without payload, wanted FeatureQueue(..., payload=...)")
        if values.shape[1:] != self.payload.shape[1:] or values.dtype != self.payload.dtype:
            raise ValueError(
                f"values: got {values.dtype} {list(values.shape)}, "
                f"wanted {self.payload.dtype} [B, {', '.join(map(str, self.payload.shape[1:]))}]"
            )
        count = values.shape[0]
        if not count:
            raise ValueError("values: got a batch of 0, wanted at least 1")
        own = values[index.clamp(0, count - 1)]
        past = self.payload[(index - count).clamp(0, self.size - 1)]
        of_batch = (index < count).reshape(index.shape + (1,) * (values.dim() - 1))
        return torch.where(of_batch, own, past)

    @eager_in_group
    def labels(self, count: int, *, group: object = None) -> Tensor:
        """Labels `[count + size]` of `count` images in front of the queue's, which have none (as `extend` has them)."""
        part, first = self._part(count, group)
        own = torch.arange(count, device=self.ids.device) + first
        return torch.cat([own, torch.full_like(self.ids[part], -1)])

    def _part(self, count: int, group: object, *same: object) -> tuple[slice, int]:
        """The slots that this process brings, and how many samples the processes before it have; all, and 0, alone."""
        if group is None:
            return slice(0, self.size), 0
        batch = self.features.new_empty(count, 0)
        shard = shard_of(group, batch, batch, "queue", self.size, same)
        sizes = tuple(self.size // shard.world + (r < self.size % shard.world) for r in range(shard.world))
        return own_of(sizes, shard.rank), shard.own_rows.start

    def __len__(self) -> int:
        """How many slots are filled (reads the buffer: synchronises on a GPU)."""
        return min(int(self.pushed), self.size)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"size={self.size}, dim={self.dim}, max_age={self.max_age}, start_step={self.start_step}"
