"""Whether matching tells right pairs from the hardest wrong ones, and captions from captions that are almost true."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastvlm_loss import hard_negatives

from .held import Held, encode_texts

__all__ = ["hard", "near"]


def hard(
    held: Held, batch_size: int, name: str = "itm", match: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, float]:  # fmt: skip
    """Accuracy on right pairs and on the hardest negatives of batches of the training's size, half and half.

    Each right pair has two wrong ones: its picture with the wrong text that is most like it, and its text with the
    wrong picture. Nothing is found where no caption differs from another one. `match` gives the logits `[n]`, on the
    CPU, of pictures and texts int64 `[n]`; without it fusion does, `held.match`.
    """
    images, texts = hardest(held, batch_size)
    own = torch.arange(len(held))
    wrong = [(own[texts >= 0], texts[texts >= 0]), (images[images >= 0], own[images >= 0])]
    image, text = (torch.cat([own, *half]) for half in zip(*wrong, strict=True))
    if len(image) == len(own):
        return {}
    says = (match or held.match)(image, text) > 0
    right, refused = says[: len(own)].double().mean(), (~says[len(own) :]).double().mean()
    return {f"{name}/accuracy_hard": 50 * (right + refused).item()}


def hardest(held: Held, batch_size: int) -> tuple[Tensor, Tensor]:
    """The nearest wrong picture of each text and the nearest wrong text of each picture, int64 `[N]`; -1 for none."""
    images: list[Tensor] = []
    texts: list[Tensor] = []
    for part in torch.arange(len(held)).split(batch_size):
        found = hard_negatives(
            held.features[part].float(), held.texts.features[part].float(), hardness=math.inf,
            image_ids=held.ids[part].to(held.device),
        )  # fmt: skip
        for into, index in ((images, found.image_index), (texts, found.text_index)):
            local = index[:, 0].cpu()
            into.append(torch.where(local >= 0, local + part[0], -1))
    return torch.cat(images), torch.cat(texts)


def near(held: Held) -> dict[str, float]:
    """Share of the distractors that match their picture less than its caption does; nothing where there are none."""
    given = [(i, caption) for i, sample in enumerate(held.samples) for caption in sample.distractors]
    if not given:
        return {}
    image = torch.tensor([i for i, _ in given])
    batch = held.collate.text([caption for _, caption in given], [held.samples[i] for i, _ in given])
    false = encode_texts(held.model, batch["tokens"], batch["mask"], held.device)
    own = torch.arange(len(held))
    true, wrong = held.match(own, own), held.match(image, torch.arange(len(given)), false)
    return {"itm/accuracy_distractors": 100 * (true[image] > wrong).double().mean().item()}
