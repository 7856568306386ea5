"""A word-level tokenizer whose vocabulary is the words of the training captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, UNKNOWN, END = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "<end>")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks: ``"flag: Côte d'Ivoire"`` is ``flag : côte d'ivoire``."""
    return _WORD.findall(text.lower().replace("_", " "))


class WordTokenizer:
    """Texts to token ids, int64 [B, L]; L is the longest text of the batch, at most ``context_length``.

    A text is its words and an end token, padded behind; longer ones are cut, unknown words become one token.
    ``vocabulary`` (all that a checkpoint needs) is the words in the order of their ids, the special ones first.
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int = 32) -> None:
        if tuple(vocabulary[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"vocabulary: got one that starts with {list(vocabulary[:3])}, wanted {list(SPECIAL)}")
        if context_length < 2:
            raise ValueError(f"context_length: got {context_length}, wanted at least 2")
        self.vocabulary = list(vocabulary)
        self.context_length = context_length
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}

    @classmethod
    def from_texts(cls, texts: Iterable[str], context_length: int = 32, max_words: int = 20_000) -> WordTokenizer:
        """The vocabulary of these texts: their ``max_words`` most frequent words, equally frequent ones by name."""
        counts = Counter(word for text in texts for word in words(text))
        known = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
        return cls([*SPECIAL, *known], context_length)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode; an empty sequence gives [0, 1]."""
        room = self.context_length - 1
        rows = [[*(self._ids.get(word, UNKNOWN) for word in words(text)[:room]), END] for text in texts]
        tokens = torch.full((len(rows), max(map(len, rows), default=1)), PAD, dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """Words of each row of [B, L], joined by spaces, without padding and end."""
        return [" ".join(self.vocabulary[t] for t in row if t not in (PAD, END)) for row in tokens.tolist()]
