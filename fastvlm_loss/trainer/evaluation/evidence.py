"""What the words of a caption say for a picture: how much likelier it makes them than other pictures do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvlm_loss import linear_cross_entropy

from .held import Held, encode_texts, spread

__all__ = ["WEIGHT", "evidence"]

WEIGHT = 0.15  # beside a score in nats, since words repeat each other; by seed 0 of configs/tiny-real.yaml


def evidence(held: Held, image: Tensor, text: Tensor, others: int, seed: int) -> Tensor:
    """Log-likelihood of a caption's words beside a picture, less that beside any picture: fp32, on the CPU, in nats.

    One half of the words, drawn at random, is hidden and read from the other half and the picture, then the other half
    likewise. The sum of log-likelihoods tells two pictures of one caption apart, but not two captions of one picture:
    long or odd ones are unlikely beside any. So it is compared with the caption's mean likelihood beside `others`
    pictures, the same ones for all captions: pointwise mutual information.

    Args:
        image, text: int64 of one shape, on the CPU: which pictures, and which samples' captions.
        others: pictures, at even steps through the held-out ones; all of them, if there are fewer.
        seed: of the halves.

    Source: Salazar et al. 2020 (masked language model scoring), equation 1, by halves of words instead of token by
    token; Church and Hanks 1990 (mutual information).
    """
    count = len(held)
    cohort = spread(count, others)
    images = torch.cat([image.flatten(), cohort.repeat_interleave(count)])
    texts = torch.cat([text.flatten(), torch.arange(count).repeat(len(cohort))])
    first, second = (_likelihood(held, images, texts, hidden) for hidden in _halves(held, seed))
    asked, beside = (first + second).split([image.numel(), len(cohort) * count])
    usual = beside.reshape(len(cohort), count).logsumexp(0) - math.log(len(cohort))
    information: Tensor = asked.reshape(image.shape) - usual[text]
    return information


def _halves(held: Held, seed: int) -> tuple[Tensor, Tensor]:
    """Bool `[N, T]` twice: all tokens of every known word are in one of them, of each text as many words in each."""
    tokens, word = held.batch["tokens"], held.batch["word"]
    known = ~torch.isin(tokens, torch.tensor(held.tokenizer.special_ids))  # others were never masked in training
    words = held.batch["mask"] & (word >= 0) & known
    number = torch.where(words, word, -1) + 1
    there = torch.zeros(len(held), words.shape[1] + 1, dtype=torch.bool).scatter_(1, number, True)
    there[:, 0] = False
    keys = torch.rand(there.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~there, 2.0)
    odd = (keys.argsort(1).argsort(1) % 2 == 1).gather(1, number)
    return words & odd, words & ~odd


def _likelihood(held: Held, image: Tensor, text: Tensor, hidden: Tensor) -> Tensor:
    """Log-likelihoods fp32 `[n]` on the CPU, summed over the tokens at `hidden` bool `[N, T]`."""
    tokens, mask = held.batch["tokens"], held.batch["mask"]
    texts = encode_texts(held.model, tokens.masked_fill(hidden, held.tokenizer.mask_id), mask, held.device)
    weight, bias = held.model("vocabulary")
    tokens, hidden = tokens.to(held.device), hidden.to(held.device)

    def judge(fused: Tensor, _: Tensor, t: Tensor) -> Tensor:
        place = hidden[t, : fused.shape[1]]
        wanted = tokens[t, : fused.shape[1]][place]
        loss = linear_cross_entropy(held.model("words", fused[place]), weight, wanted, bias, reduction="none")
        return torch.zeros(place.shape, device=loss.device).masked_scatter(place, -loss.float()).sum(1)

    return held.of_pairs(image, text, texts, judge)
