"""Samples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..text import Encoded, Tokenizer
from .samples import Sample, caption_id
from .words import WordKinds

Batch = dict[str, Any]
ROUND = 4  # a batch is as long as its longest text, rounded up to a multiple of this


class Row(NamedTuple):
    """A sample as it goes into a batch: its text (a caption, maybe with tags behind) and its question, if any."""

    sample: Sample
    text: str
    question: tuple[str, str] | None = None


class Collator:
    """Makes batches; the same rows make the same batch.

    ``length`` and ``question_length`` count special tokens; ``full`` pads to them always.
    """

    def __init__(
        self, tokenizer: Tokenizer, kinds: WordKinds, length: int, question_length: int, questions: bool = False,
        full: bool = False, answers: Sequence[str] = (),
    ) -> None:  # fmt: skip
        for name, value, low in (("context_length", length, 3), ("question_length", question_length, 5)):
            if value < low:
                raise ValueError(f"{name}: got {value}, wanted at least {low}")
        self.tokenizer, self.kinds = tokenizer, kinds
        self.length, self.question_length, self.questions, self.full = length, question_length, questions, full
        self.place = {answer: k for k, answer in enumerate(answers)}

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch as ``fastvlm_loss.trainer.data`` describes it; pictures stay uint8 [B, H, W, 3]."""
        batch: Batch = {
            "images": torch.from_numpy(np.stack([_picture(row.sample) for row in rows])),
            "index": torch.tensor([row.sample.index for row in rows], dtype=torch.int64),
            "ids": torch.tensor([caption_id(row.sample.caption) for row in rows], dtype=torch.int64),
            "captions": [row.sample.caption for row in rows],
            "text": self.text([row.text for row in rows], [row.sample for row in rows]),
        }
        if self.questions:
            batch["question"] = self.question([row.question for row in rows])
        return batch

    def text(self, texts: Sequence[str], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """``[CLS] words [SEP]`` with the words' numbers, kinds and concreteness; cut at ``length``."""
        encoded = [self._cut(self.tokenizer.encode(text), self.length - 2) for text in texts]
        found = self._frame(
            [[self.tokenizer.cls_id, *row.tokens, self.tokenizer.sep_id] for row in encoded], self.length
        )
        shape = found["tokens"].shape
        word = np.full(shape, -1, np.int64)
        kind, concreteness = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
        for i, (row, sample) in enumerate(zip(encoded, samples, strict=True)):
            if not row.words:
                continue
            known = self.kinds(row.texts, sample)
            place = slice(1, 1 + len(row.words))
            word[i, place] = row.words
            kind[i, place] = [known[w][0] for w in row.words]
            concreteness[i, place] = [known[w][1] for w in row.words]
        return {
            **found, "word": torch.from_numpy(word), "kind": torch.from_numpy(kind),
            "concreteness": torch.from_numpy(concreteness),
        }  # fmt: skip

    def question(self, questions: Sequence[tuple[str, str] | None]) -> dict[str, Tensor]:
        """``[CLS] question [SEP] answer [SEP]``; the question is cut so that the answer fits.

        ``prompt_lengths`` counts up to the first [SEP], ``answer`` is the answer's first token, ``choice`` its place
        among the answers to choose from, -1 for none, ``weight`` is 0 for a sample without a question (its row is
        ``[CLS] [SEP] [SEP]``).
        """
        rows, prompts, answers, choices = [], [], [], []
        cls, sep = self.tokenizer.cls_id, self.tokenizer.sep_id
        for asked in questions:
            answer = self.tokenizer.encode(asked[1]).tokens[: self.question_length - 3] if asked else []
            prompt = self.tokenizer.encode(asked[0]).tokens[: self.question_length - 3 - len(answer)] if asked else []
            rows.append([cls, *prompt, sep, *answer, sep])
            prompts.append(2 + len(prompt))
            answers.append(answer[0] if answer else self.tokenizer.pad_id)
            choices.append(self.place.get(asked[1].lower(), -1) if asked else -1)
        return {
            **self._frame(rows, self.question_length),
            "prompt_lengths": torch.tensor(prompts, dtype=torch.int64),
            "answer": torch.tensor(answers, dtype=torch.int64),
            "choice": torch.tensor(choices, dtype=torch.int64),
            "weight": torch.tensor([float(asked is not None) for asked in questions]),
        }

    def _cut(self, encoded: Encoded, room: int) -> Encoded:
        words = encoded.words[:room]
        return Encoded(encoded.tokens[:room], words, encoded.texts[: max(words, default=-1) + 1])

    def _frame(self, rows: Sequence[list[int]], length: int) -> dict[str, Tensor]:
        longest = max(map(len, rows), default=1)
        width = length if self.full else min(length, -(-longest // ROUND) * ROUND)
        tokens = np.full((len(rows), width), self.tokenizer.pad_id, np.int64)
        mask = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}


def _picture(sample: Sample) -> np.ndarray:
    if sample.image is None:
        raise ValueError(f"samples: got number {sample.index} without its picture, wanted all with pictures")
    return sample.image
