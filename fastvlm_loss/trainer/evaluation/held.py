"""The held-out pairs: each picture and each text is encoded once, and chosen pairs of them are fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import ROUND, Collator
from ..data.samples import Sample, caption_id
from ..text import Tokenizer

__all__ = ["ROWS", "Held", "Model", "Texts", "encode", "encode_texts", "spread", "top"]

Model = Callable[..., Any]
ROWS = 256  # pictures, texts or pairs in one call of the model


@dataclass(frozen=True)
class Texts:
    """N encoded texts.

    Attributes:
        lengths: int64 `[N]` on the CPU, tokens of each.
        mask: bool `[N, T]`.
        features: fp32 `[N, D]`.
        hidden: `[N, T, W]`, what the fusion encoder reads.
    """

    lengths: Tensor
    mask: Tensor
    features: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Held:
    """N held-out pairs, and the model that encoded them.

    Attributes:
        batch: `tokens`, `mask`, `word`, `kind`, `concreteness` `[N, T]` of the captions, on the CPU.
        ids: int64 `[N]` on the CPU; equal captions have equal ids.
        features: fp32 `[N, D]` of the pictures.
        tokens: `[N, P, W]` of the pictures.
        texts: the captions, encoded.
    """

    model: Model
    tokenizer: Tokenizer
    collate: Collator
    samples: Sequence[Sample]
    device: torch.device
    batch: Mapping[str, Tensor]
    ids: Tensor
    features: Tensor
    tokens: Tensor
    texts: Texts

    def __len__(self) -> int:
        return len(self.samples)

    def match(self, image: Tensor, text: Tensor, of: Texts | None = None) -> Tensor:
        """By how much the match logit is above the other one, fp32 on the CPU, for pairs of a picture and a text.

        Args:
            image, text: int64 of one shape, on the CPU.
            of: the texts, if not the captions.
        """
        texts = of or self.texts

        def judge(fused: Tensor, i: Tensor, t: Tensor) -> Tensor:
            logits = self.model("match", fused, self.features[i], texts.features[t]).float()
            difference: Tensor = logits[:, 1] - logits[:, 0]
            return difference

        return self.of_pairs(image, text, texts, judge)

    def of_pairs(self, image: Tensor, text: Tensor, texts: Texts, judge: Callable[..., Tensor]) -> Tensor:
        """What `judge(fused [n, T, W], image [n], text [n])`, fp32 `[n]`, says of pairs, on the CPU.

        A pair that is asked for twice is fused once; texts of like length go together, so that they are padded little.
        """
        count, most = texts.mask.shape
        pairs, back = torch.unique(image * count + text, return_inverse=True)
        order = texts.lengths[pairs % count].argsort(stable=True)
        found = torch.empty(len(pairs))
        for part in order.split(ROWS) if len(pairs) else ():
            i, t = pairs[part] // count, pairs[part] % count
            longest = int(texts.lengths[t].max())
            width = most if self.collate.full else min(most, -(-longest // ROUND) * ROUND)
            i, t = i.to(self.device), t.to(self.device)
            fused = self.model("fuse", texts.hidden[t, :width], texts.mask[t, :width], self.tokens[i])
            found[part] = judge(fused, i, t).cpu()
        return found[back]

    def fuse(self, tokens: Tensor, mask: Tensor, prefix: Tensor | None, image: Tensor | None) -> Tensor:
        """Fused states `[n, T, W]` of other texts with the pictures `image` int64 `[n]`, or with none."""
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        prefix = None if prefix is None else prefix.to(self.device)
        hidden = self.model("text", tokens, mask, prefix)["hidden"]
        seen = None if image is None else self.tokens[image.to(self.device)]
        fused: Tensor = self.model("fuse", hidden, mask, seen, prefix)
        return fused


def encode(
    model: Model, tokenizer: Tokenizer, collate: Collator, samples: Sequence[Sample], device: torch.device
) -> Held:
    """Encode pictures and captions of at least one sample."""
    made = []
    for at in range(0, len(samples), ROWS):
        pictures = np.stack([s.image for s in samples[at : at + ROWS] if s.image is not None])
        made.append(model("image", torch.from_numpy(pictures).to(device)))
    batch = collate.text([s.caption for s in samples], samples)
    return Held(
        model, tokenizer, collate, samples, device, batch, torch.tensor([caption_id(s.caption) for s in samples]),
        torch.cat([m["features"] for m in made]), torch.cat([m["tokens"] for m in made]),
        encode_texts(model, batch["tokens"], batch["mask"], device),
    )  # fmt: skip


def encode_texts(model: Model, tokens: Tensor, mask: Tensor, device: torch.device) -> Texts:
    """Encode tokens int64 `[N, T]` of at least one text."""
    parts = zip(tokens.split(ROWS), mask.split(ROWS), strict=True)
    made = [model("text", t.to(device), m.to(device)) for t, m in parts]
    features, hidden = (torch.cat([m[name] for m in made]) for name in ("features", "hidden"))
    return Texts(mask.sum(1), mask.to(device), features, hidden)


def logits(held: Held, rows: Tensor) -> Tensor:
    """Of the vocabulary, fp32 `[r, V]`, for fused states `[r, W]`; -inf for tokens that no text has inside.

    The product is one of fp32 even under autocast: logits in bf16 tie.
    """
    rows = held.model("words", rows)
    weight, bias = held.model("vocabulary")
    with torch.autocast(rows.device.type, enabled=False):
        found = torch.addmm(bias.float(), rows.float(), weight.float().T)
    special = held.tokenizer
    outside = {special.pad_id, special.cls_id, special.mask_id} - {special.sep_id}  # CLIP pads with its [SEP]
    found[:, sorted(outside)] = -torch.inf
    return found


def top(held: Held, rows: Tensor) -> Tensor:
    """The likeliest token, int64 `[r]` on the CPU, for fused states `[r, W]`."""
    found = [logits(held, part).argmax(1).cpu() for part in rows.split(16 * ROWS)]
    return torch.cat(found)


def spread(count: int, few: int) -> Tensor:
    """Up to `few` numbers below `count`, at even steps, int64."""
    few = min(few, count)
    return (torch.arange(few) + 0.5).mul(count / few).long()
