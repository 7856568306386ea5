"""One door to the data of a run: sources, tokenizer, batches of steps, samples to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.images import BadImage
from ..text import LocalTokenizer, Tokenizer, WordVocabulary
from .batch import Batch, Collator, Row
from .config import DataConfig
from .samples import Opened, Sample, Skip, Source, reason_of
from .sources import open_source
from .words import WordKinds

# samples of a source, spread over it, whose words and answers are collected; the shapes say all they can say early
COLLECTED, COLLECTED_SHAPES = 50_000, 2_000


@dataclass(frozen=True)
class Data:
    """The data of a run.

    ``answers`` are the different answers of the training questions, in small letters, sorted: what to choose from.
    Where a source is large they are those of ``COLLECTED`` of its samples.
    ``skipped`` is what was left out when the sources were opened, and what ``held`` could not read.
    """

    config: DataConfig
    seed: int
    sources: list[Opened]
    tokenizer: Tokenizer
    collate: Collator
    answers: list[str]
    skipped: list[Skip]

    @classmethod
    def open(cls, config: DataConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> Data:
        """Open every source and make (or take) the tokenizer.

        Raises ValueError, naming the path and the reason, for a source that is missing, of another kind, or without a
        usable pair, and for a tokenizer or a word list that cannot be read.
        """
        if not config.sources:
            raise ValueError("sources: got none, wanted at least one")
        kinds = WordKinds(config.object_words, config.concreteness)
        if tokenizer is None and config.tokenizer != "words":
            tokenizer = LocalTokenizer.open(config.tokenizer)
        sources = [open_source(source, config, seed, place) for place, source in enumerate(config.sources)]
        texts: list[str] = []
        answers: set[str] = set()
        for source, opened in zip(config.sources, sources, strict=True):
            for sample in _described(opened.train, COLLECTED_SHAPES if source.path == "shapes" else COLLECTED):
                asked_of = [text for question in sample.questions for text in question] if config.questions else []
                texts += [sample.caption, *sample.tags, *asked_of]
                answers.update(answer.lower() for _, answer in sample.questions)
        chosen = WordVocabulary.from_texts(texts, config.max_words) if tokenizer is None else tokenizer
        skipped = [skip for opened in sources for skip in opened.skipped]
        lengths = config.context_length, config.question_length
        collate = Collator(chosen, kinds, *lengths, config.questions, config.full_length, sorted(answers))
        return cls(config, seed, sources, chosen, collate, sorted(answers), skipped)

    @property
    def note(self) -> str:
        """What there is, one line a source."""
        return "\n".join(source.note for source in self.sources)

    def held(self, limit: int) -> list[Sample]:
        """Up to ``limit`` readable held-out samples, first ones first, in equal parts of the sources if they can."""
        found: list[Sample] = []
        parts = [source.held for source in self.sources]
        for k, part in enumerate(parts):
            room = (limit - len(found)) // (len(parts) - k)
            for number in range(len(part)):
                if not room:
                    break
                try:
                    found.append(part.read(number))
                    room -= 1
                except (BadImage, OSError) as error:
                    skip = Skip(part.name, part.key(number), reason_of(error))
                    if skip not in self.skipped:
                        self.skipped.append(skip)
        return found

    def batches(self, samples: Sequence[Sample], batch_size: int) -> Iterator[Batch]:
        """The samples in order, as they are: no augmentation, no tags; of several questions one by their index."""
        for at in range(0, len(samples), batch_size):
            yield self.collate([Row(s, s.caption, asked(s)) for s in samples[at : at + batch_size]])


def asked(sample: Sample) -> tuple[str, str] | None:
    """The question that a sample is evaluated on."""
    if not sample.questions:
        return None
    return sample.questions[np.random.default_rng(sample.index).integers(len(sample.questions))]


def _described(part: Source, limit: int) -> Iterator[Sample]:
    for number in np.unique(np.linspace(0, max(0, len(part) - 1), min(limit, len(part))).astype(np.int64)):
        try:
            yield part.read(int(number), picture=False)
        except (BadImage, OSError):
            continue
