"""What a report shows of a few pictures: where a hidden word looks, and which negatives are picked for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvlm_loss import hard_negatives

from .held import Held, top
from .words import hidden_words

__all__ = ["HARDNESS", "Look", "Picks", "looks", "picks"]

HARDNESS = (0.0, 0.5, 1.0, math.inf)
_K = 4  # negatives of each picture that are shown


@dataclass(frozen=True)
class Look:
    """Of held-out sample `sample`: the caption with [MASK], the hidden word, the likeliest one, and the attention.

    Attributes:
        heat: fp32 `[h, w]`, from the hidden word to the picture's tokens, mean over heads and layers.
    """

    sample: int
    caption: str
    word: str
    guess: str
    heat: Tensor


@dataclass(frozen=True)
class Picks:
    """Negative texts of some pictures.

    Attributes:
        samples: int64 `[n]`, the pictures.
        texts: for each of `HARDNESS`, int64 `[n, k]`, -1 for none.
    """

    samples: Tensor
    texts: dict[float, Tensor]


def looks(held: Held, shown: Tensor, seed: int) -> list[Look]:
    """For the samples `shown` (int64) that have a word to hide; nothing where the picture's tokens are no square."""
    tokens, labels = (t[shown] for t in hidden_words(held, seed))
    mask, count = held.batch["mask"][shown], held.tokens.shape[1]
    side = math.isqrt(count)
    if tokens.shape[1] == count:  # else attention to the text and to the picture look alike
        tokens, labels = F.pad(tokens, (0, 1), value=held.tokenizer.pad_id), F.pad(labels, (0, 1), value=-100)
        mask = F.pad(mask, (0, 1))
    found, decode = [], held.tokenizer.decode
    for row, i in enumerate(shown.tolist()):
        place, one = labels[row] >= 0, slice(row, row + 1)
        with torch.compiler.set_stance("force_eager"), _Watch(count) as watch:
            fused = held.fuse(tokens[one], mask[one], None, shown[one])
        if not watch.seen or side * side not in (count - 1, count - 2):  # the picture's, and a class token
            return []
        if bool(place.any()):
            guess = top(held, fused[0][place.to(fused.device)]).tolist()
            heat = torch.cat(watch.seen).mean(0)[:, count - side * side :].cpu()[place].mean(0).reshape(side, side)
            heat = heat / heat.sum().clamp(min=1e-12)  # what looks at the whole picture is left out
            found.append(
                Look(i, decode(tokens[row].tolist()), decode(labels[row][place].tolist()), decode(guess), heat)
            )
    return found


def picks(held: Held, shown: Tensor, batch_size: int, seed: int) -> Picks:
    """Negatives of the samples `shown` (int64) in one batch of the training's size, which they begin."""
    rest = torch.ones(len(held), dtype=torch.bool)
    rest[shown] = False
    batch = torch.cat([shown, rest.nonzero()[:, 0]])[: max(batch_size, len(shown))]
    texts = {}
    for hardness in HARDNESS:
        found = hard_negatives(
            held.features[batch].float(), held.texts.features[batch].float(), _K, hardness=hardness,
            image_ids=held.ids[batch].to(held.device), seed=seed, step=0,
        ).text_index[: len(shown)].cpu()  # fmt: skip
        texts[hardness] = torch.where(found >= 0, batch[found.clamp(min=0)], -1)
    return Picks(shown, texts)


class _Watch(TorchFunctionMode):
    """Keeps the weights of every attention over `keys` keys, mean over heads, `[n, T, keys]`."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.seen = keys, list[Tensor]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[1].shape[-2] == self.keys:
            query, key = args[0].float(), args[1].float()
            scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
            with torch.autocast(query.device.type, enabled=False):
                self.seen.append((scale * query @ key.mT).softmax(-1).mean(1))
        return function(*args, **(kwargs or {}))
