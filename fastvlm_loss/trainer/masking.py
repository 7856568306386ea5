"""Masked language modelling: which tokens of a caption are hidden (Bitton et al. 2021), and by what (BERT's 80/10/10).

Everything drawn is a Philox word of (seed, sample, position, step): it depends on no other row of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..scores.philox import halves, philox
from .masking_words import candidates, first_of_word, gumbel_choice

Strategy = Literal["baseline", "objects", "content", "top_concrete", "hard"]
STRATEGIES: tuple[Strategy, ...] = ("baseline", "objects", "content", "top_concrete", "hard")
IGNORED = -100
_ROW = 0xFFFFFFFF  # the position under which a row's own words are drawn
_MASKED, _REPLACED = round(0.8 * 2**32), round(0.9 * 2**32)


class Vocabulary(Protocol):
    """What masking needs of a tokenizer."""

    mask_id: int
    special_ids: tuple[int, ...]

    def __len__(self) -> int: ...


class Masker(nn.Module):
    """Chooses tokens of each caption, and hides 80 % of them behind [MASK], 10 % behind a random token, 10 % not.

    ``baseline`` chooses each token with ``probability`` (with ``whole_word`` each word, all its tokens), and one at
    random where that chose none. The others choose one word of each caption, all its tokens:

    - ``objects``: an object word; where there is none a content word, else as ``baseline``;
    - ``content``: with probability 0.8 a content word, else a stop word or punctuation mark (of which there may be
      only one kind);
    - ``top_concrete``: of the three most concrete content words, with .55, .30, .15 (of two .75, .25), else any word;
    - ``hard``: w with a probability in proportion to exp(clip(d_w, -5, 5) / temperature), d_w being how much the image
      helped with this word so far (``observe``); ``objects`` in the first ``warmup`` steps. Ours, not of the paper.

    Args:
        vocabulary: a tokenizer.
        seed: of all draws, >= 0.
        probability: of ``baseline``, in (0, 1].
        temperature, decay, warmup: of ``hard``.

    Raises:
        ValueError: an unknown strategy, or a number out of its range.

    Source: Bitton et al., "Data Efficient Masked Language Modeling for Vision and Language", 2021; Devlin et al. 2019.
    """

    special: Tensor
    ordinary: Tensor
    table: Tensor

    def __init__(
        self, strategy: Strategy, vocabulary: Vocabulary, seed: int = 0, probability: float = 0.15,
        whole_word: bool = False, temperature: float = 1.0, decay: float = 0.99, warmup: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy!r}, wanted one of {', '.join(map(repr, STRATEGIES))}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability: got {probability}, wanted more than 0 and at most 1")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, wanted more than 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, wanted at least 0 and less than 1")
        self.strategy, self.seed, self.probability = strategy, seed, probability
        self.whole_word, self.temperature, self.decay, self.warmup = whole_word, temperature, decay, warmup
        self.mask_id = vocabulary.mask_id
        special = torch.zeros(len(vocabulary), dtype=torch.bool)
        special[list(vocabulary.special_ids)] = True
        if bool(special.all()):
            raise ValueError("vocabulary: got special tokens only, wanted at least one that may be masked")
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("ordinary", (~special).nonzero().squeeze(1), persistent=False)
        self.register_buffer("table", torch.zeros(len(vocabulary)), persistent=strategy == "hard")

    @torch.no_grad()
    def forward(self, text: Mapping[str, Tensor], index: Tensor, step: int) -> dict[str, Tensor]:
        """Corrupt the texts of a batch.

        Args:
            text: ``batch["text"]``: tokens, mask, word, kind, concreteness, each [B, T].
            index: int64 [B], the samples' numbers.
            step: in [0, 2**32).

        Returns:
            tokens int64 [B, T] with some replaced; mask as it came; labels int64 [B, T], the original token where it
            was chosen, -100 elsewhere. A text without words has no labels.
        """
        tokens, mask = text["tokens"], text["mask"]
        low, high = (index & 0xFFFFFFFF)[:, None], (index >> 32 & 0xFFFFFFFF)[:, None]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        key = halves(self.seed)
        choose, corrupt, replacement, tie = philox((low, high, position, step), key)
        coin = philox((low, high, _ROW, step), key)[0]
        eligible = mask & ~self.special[tokens] & (text["word"] >= 0)
        first = first_of_word(text["word"], eligible)
        random = self._random(choose, tie, eligible, first)
        strategy: str = self.strategy
        if strategy == "hard" and step < self.warmup:
            strategy = "objects"
        if strategy == "baseline":
            chosen = random
        else:
            weights, found = candidates(strategy, text, first, coin, self._usefulness(tokens, text["word"], eligible))
            word = torch.where(gumbel_choice(weights, tie), text["word"], -1).amax(1, keepdim=True)
            chosen = torch.where(found[:, None], eligible & (text["word"] == word), random)
        hidden = torch.where(corrupt < _MASKED, self.mask_id, tokens)
        other = self.ordinary[replacement * len(self.ordinary) >> 32]
        hidden = torch.where((corrupt >= _MASKED) & (corrupt < _REPLACED), other, hidden)
        return {
            "tokens": torch.where(chosen, hidden, tokens), "mask": mask, "labels": torch.where(chosen, tokens, IGNORED)
        }  # fmt: skip

    @torch.no_grad()
    def observe(self, tokens: Tensor, delta: Tensor) -> None:
        """Take in how much the image helped: for tokens int64 [n], loss without the image minus loss with it, fp [n].

        The table moves once a call, towards the mean of each token that occurs. In several processes give each the
        tokens of all, or the tables part ways.
        """
        counts = torch.bincount(tokens, minlength=len(self.table))
        total = torch.zeros_like(self.table).index_add_(0, tokens, delta.to(self.table.dtype))
        moved = self.decay * self.table + (1 - self.decay) * total / counts.clamp(min=1)
        self.table.copy_(torch.where(counts > 0, moved, self.table))

    def _random(self, choose: Tensor, tie: Tensor, eligible: Tensor, first: Tensor) -> Tensor:
        """Independent draws; the one with the smallest tie where they chose none."""
        if self.whole_word:
            place = torch.where(first, torch.arange(first.shape[1], device=first.device), 0).cummax(1).values
            choose, tie = choose.gather(1, place), tie.gather(1, place)
        drawn = eligible & (choose < round(self.probability * 2**32))
        lowest = torch.where(eligible, tie, 1 << 32)
        forced = eligible & (lowest == lowest.amin(1, keepdim=True))
        return torch.where(drawn.any(1, keepdim=True), drawn, forced)

    def _usefulness(self, tokens: Tensor, word: Tensor, eligible: Tensor) -> Tensor | None:
        """Logit of each token's word: the mean of its tokens in the table, clipped, over the temperature."""
        if self.strategy != "hard":
            return None
        place = word.clamp(min=0)
        total = torch.zeros(tokens.shape, device=tokens.device)
        count = total.scatter_add(1, place, eligible.float())
        total = total.scatter_add(1, place, torch.where(eligible, self.table[tokens], 0.0))
        return (total / count.clamp(min=1)).gather(1, place).clamp(-5, 5) / self.temperature
