"""Questions: the share that the model answers with the reference's words, against always giving the usual answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .held import ROWS, Held
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


def questions(held: Held, choices: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy of greedy answers, or of the likeliest of `choices`, and of the usual answer to like questions.

    Those begin with the same two words. The latter is counted on these questions themselves: no answer that depends on
    those two words alone is better.
    """
    asked = [(i, *pair) for i, sample in enumerate(held.samples[:_SAMPLES]) for pair in sample.questions]
    if not asked:
        return {}
    batch = held.collate.question([(question, answer) for _, question, answer in asked])
    image = torch.tensor([i for i, _, _ in asked])
    if choices:
        chosen = _chosen(held, batch["tokens"], batch["prompt_lengths"], image)
        right = torch.tensor([choices[k] == answer.lower() for k, (_, _, answer) in zip(chosen, asked, strict=True)])
    else:
        agrees, counts = agreement(held, batch["tokens"], batch["mask"], batch["prompt_lengths"], image)
        right = (agrees | ~counts).all(1)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question, answer in asked:
        kinds[" ".join(question.lower().split()[:2])][answer.lower()] += 1
    usual = sum(counts.most_common(1)[0][1] for counts in kinds.values())
    return {
        "vqa/accuracy": 100 * right.double().mean().item(),
        "vqa/majority": 100 * usual / len(asked),
    }


def some_answers(held: Held, shown: Tensor, choices: Sequence[str] = ()) -> list[Answer]:
    """A question of each of the samples `shown` (int64) that has one, the k-th of the k-th sample."""
    asked: list[tuple[int, str, str]] = []
    for k, i in enumerate(shown.tolist()):
        given = held.samples[i].questions
        if given:
            asked.append((i, *given[k % len(given)]))
    if not asked:
        return []
    batch = held.collate.question([(question, answer) for _, question, answer in asked])
    image, prompts = torch.tensor([i for i, _, _ in asked]), batch["prompt_lengths"]
    if choices:
        texts = [choices[k] for k in _chosen(held, batch["tokens"], prompts, image)]
    else:
        room = held.collate.question_length - int(prompts.max())
        texts = written(held, batch["tokens"], prompts, image, max(1, min(room, 4)))
    return [Answer(*known, text) for known, text in zip(asked, texts, strict=True)]


def _chosen(held: Held, tokens: Tensor, prompts: Tensor, image: Tensor) -> list[int]:
    """The place of the likeliest answer of each question, tokens int64 `[n, T]` of which `prompts` `[n]` ask."""
    found: list[int] = []
    for part in torch.arange(len(tokens)).split(ROWS):
        width = int(prompts[part].max())
        mask = torch.arange(width) < prompts[part, None]
        fused = held.fuse(tokens[part, :width], mask, prompts[part], image[part])
        found += held.model("answers", fused).argmax(1).tolist()
    return found
