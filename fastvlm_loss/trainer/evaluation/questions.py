"""Questions: the share that the model answers with the reference's words, against always giving the usual answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from .held import Held
from .writing import agreement, written

__all__ = ["Answer", "questions", "some_answers"]

_SAMPLES = 1000  # that are asked all their questions


@dataclass(frozen=True)
class Answer:
    """Of held-out sample `sample`: a question, the reference answer, and the model's."""

    sample: int
    question: str
    reference: str
    given: str


def questions(held: Held) -> dict[str, float]:
    """Accuracy of greedy answers, and of the most frequent answer to questions of the same first two words.

    The latter is counted on these questions themselves: no answer that depends on those two words alone is better.
    """
    asked = [(i, *pair) for i, sample in enumerate(held.samples[:_SAMPLES]) for pair in sample.questions]
    if not asked:
        return {}
    batch = held.collate.question([(question, answer) for _, question, answer in asked])
    image = torch.tensor([i for i, _, _ in asked])
    agrees, counts = agreement(held, batch["tokens"], batch["mask"], batch["prompt_lengths"], image)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question, answer in asked:
        kinds[" ".join(question.lower().split()[:2])][answer.lower()] += 1
    usual = sum(counts.most_common(1)[0][1] for counts in kinds.values())
    return {
        "vqa/accuracy": 100 * (agrees | ~counts).all(1).double().mean().item(),
        "vqa/majority": 100 * usual / len(asked),
    }


def some_answers(held: Held, shown: Tensor) -> list[Answer]:
    """A question of each of the samples `shown` (int64) that has one, the k-th of the k-th sample."""
    asked: list[tuple[int, str, str]] = []
    for k, i in enumerate(shown.tolist()):
        given = held.samples[i].questions
        if given:
            asked.append((i, *given[k % len(given)]))
    if not asked:
        return []
    batch = held.collate.question([(question, answer) for _, question, answer in asked])
    room = held.collate.question_length - int(batch["prompt_lengths"].max())
    image = torch.tensor([i for i, _, _ in asked])
    texts = written(held, batch["tokens"], batch["prompt_lengths"], image, max(1, min(room, 4)))
    return [Answer(*known, text) for known, text in zip(asked, texts, strict=True)]
