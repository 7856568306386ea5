"""A cross-batch queue: features of past batches as further negatives (MoCo, XBM, ALBEF)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import check

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
    that are not filled, or too old, have the id -1 and are no candidates. Features in the queue have no gradient.

    Args:
        size: slots.
        dim: D of the features.
        dtype: they are kept in; bf16 halves the memory of fp32.
        max_age: steps after which an entry is no candidate; None keeps all.
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

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, max_age: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.dim = check.whole("size", size, low=1), check.whole("dim", dim, low=1)
        self.max_age = None if max_age is None else check.whole("max_age", max_age, low=0)
        if dtype not in check.DTYPES:
            raise TypeError(f"dtype: got {dtype}, wanted float64, float32, bfloat16 or float16")
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("steps", torch.zeros(size, dtype=torch.int64, device=device))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def push(self, features: Tensor, ids: Tensor | None = None, step: int | Tensor = 0) -> None:
        """Store a batch of any size; of one larger than the queue its last features stay.

        Args:
            features: floating `[B, D]`, detached here.
            ids: int `[B]`, or None for features that equal nobody's; -1 stores an entry that is no candidate.
            step: when they were made, for `max_age`.
        """
        x = check.features("features", features)
        if x.shape[1] != self.dim:
            raise ValueError(f"features: got {list(x.shape)}, wanted [B, {self.dim}]")
        if x.device != self.features.device:
            raise ValueError(f"features: got a tensor on {x.device}, wanted {self.features.device}")
        count = x.shape[0]
        own = OWN - 1 - self.pushed - torch.arange(count, device=x.device)
        new = own if ids is None else check.integers("ids", ids, count, x)
        if not isinstance(step, Tensor):
            check.whole("step", step)
        stay = min(count, self.size)
        slot = (self.cursor + count - stay + torch.arange(stay, device=x.device)) % self.size
        self.features[slot] = x[count - stay :].to(self.features.dtype)
        self.ids[slot] = new[count - stay :]
        self.steps[slot] = torch.as_tensor(step, dtype=torch.int64, device=x.device)
        self.cursor.copy_((self.cursor + count) % self.size)
        self.pushed.add_(count)

    def valid_ids(self, step: int | Tensor | None = None) -> Tensor:
        """Ids `[size]` of the slots, -1 where there is nothing or, given the current `step`, something too old."""
        if self.max_age is None or step is None:
            return self.ids.clone()
        return self.ids.masked_fill(self.steps < step - self.max_age, -1)

    def extend(
        self, features: Tensor, ids: Tensor | None = None, step: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The batch's features and ids, and behind them the queue's: `[B + size, D]` and `[B + size]`.

        Args:
            features: floating `[B, D]`; their gradient stays.
            ids: int `[B]`; None gives each one that equals nobody's. Use the same for the other side's anchors: what
                equals an anchor's id is no negative of it.
            step: the current one, for `max_age`.
        """
        x = check.features("features", features)
        if x.shape[1] != self.dim:
            raise ValueError(f"features: got {list(x.shape)}, wanted [B, {self.dim}]")
        own = self.own_ids(x.shape[0]) if ids is None else check.integers("ids", ids, x.shape[0], x)
        return torch.cat([x, self.features.to(x.dtype)]), torch.cat([own, self.valid_ids(step)])

    def own_ids(self, count: int) -> Tensor:
        """Ids `[count]` for a batch without any: they equal nobody's, as long as they are not pushed themselves."""
        return OWN + 1 + torch.arange(count, device=self.ids.device)

    def labels(self, count: int) -> Tensor:
        """Labels `[count + size]` of `count` images in front of the queue's, which have none."""
        return torch.cat([torch.arange(count, device=self.ids.device), torch.full_like(self.ids, -1)])

    def __len__(self) -> int:
        """How many slots are filled (reads the buffer: synchronises on a GPU)."""
        return min(int(self.pushed), self.size)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"size={self.size}, dim={self.dim}, max_age={self.max_age}"
