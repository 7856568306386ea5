"""What the words of a text say for a picture: how much likelier this picture makes them than other pictures do."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm_loss import linear_cross_entropy

from .held import Held, encode_texts

__all__ = ["WEIGHT", "evidence"]

WEIGHT = 0.5  # of a standard deviation beside scores in nats; by one seed of configs/tiny-real.yaml, where 0.3 to 1 do
_FLOOR = 0.5  # nats, added to a spread of nearly 0: of words that no picture says anything of


def evidence(held: Held, image: Tensor, text: Tensor, others: int, seed: int) -> Tensor:
    """By how many standard deviations a caption's words are likelier beside a picture than beside others.

    One half of the words, drawn at random, is hidden and read from the other half and the picture, then the other half
    likewise. The sum of log-likelihoods tells two pictures of one caption apart, but not two captions of one picture:
    long or odd ones are unlikely beside any. So each caption's is measured by what it is beside `others` pictures, the
    same ones for all, of which nothing but the pictures is used.

    Args:
        image, text: int64 of one shape, on the CPU: which pictures, and which samples' captions.
        others: pictures, at even steps through the held-out ones; all of them, if there are fewer.
        seed: of the halves.

    Source: Salazar et al. 2020 (masked language model scoring), equation 1, by halves instead of token by token;
    Auckenthaler et al. 2000 (z-norm) for the comparison.
    """
    count = len(held)
    beside = torch.arange(count).tensor_split(min(others, count))
    cohort = torch.stack([part[len(part) // 2] for part in beside])
    images = torch.cat([image.flatten(), cohort.repeat_interleave(count)])
    texts = torch.cat([text.flatten(), torch.arange(count).repeat(len(cohort))])
    first, second = (_likelihood(held, images, texts, hidden) for hidden in _halves(held, seed))
    asked, usual = (first + second).split([image.numel(), len(cohort) * count])
    usual = usual.reshape(len(cohort), count)
    mean, spread = usual.mean(0), usual.std(0, correction=0) + _FLOOR
    deviations: Tensor = (asked.reshape(image.shape) - mean[text]) / spread[text]
    return deviations


def _halves(held: Held, seed: int) -> tuple[Tensor, Tensor]:
    """Bool `[N, T]` twice: every token inside a word is in one of them, as many as can be of each text in each."""
    words = held.batch["mask"] & (held.batch["word"] >= 0)
    keys = torch.rand(words.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~words, 2.0)
    odd = keys.argsort(1).argsort(1) % 2 == 1
    return words & odd, words & ~odd


def _likelihood(held: Held, image: Tensor, text: Tensor, hidden: Tensor) -> Tensor:
    """Log-likelihoods fp32 `[n]` on the CPU, summed over the tokens at `hidden` bool `[N, T]`."""
    tokens, mask = held.batch["tokens"], held.batch["mask"]
    texts = encode_texts(held.model, tokens.masked_fill(hidden, held.tokenizer.mask_id), mask, held.device)
    weight, bias = held.model("vocabulary")
    tokens, hidden = tokens.to(held.device), hidden.to(held.device)

    def judge(fused: Tensor, _: Tensor, t: Tensor) -> Tensor:
        place = hidden[t, : fused.shape[1]]
        rows = held.model("words", fused[place])
        loss = linear_cross_entropy(rows, weight, tokens[t, : fused.shape[1]][place], bias, reduction="none")
        row = place.nonzero()[:, 0]
        return torch.zeros(len(t), device=loss.device).index_add(0, row, -loss.float())

    return held.judged(image, text, texts, judge)
