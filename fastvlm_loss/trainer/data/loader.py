"""Batches of steps, read by workers: a run that starts at step s gets the batches of the one that started at 0."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data.augment import DICE, RESTYLE_DICE, restyle, shake
from ...data.images import BadImage
from ...data.pairs import KEYWORDS
from .batch import Batch, Collator, Row
from .config import DataConfig
from .order import PICTURE, QUESTION, STYLE, TEXT, Order, dice
from .samples import Sample, Skip, Source, reason_of

if TYPE_CHECKING:
    from .opened import Data

SHOWN = 5  # bad samples that are printed
TRIES = 1000  # unreadable samples in a row after which the source as a whole counts as unreadable
_AT_ONCE = 64  # pictures augmented together


class Steps(Dataset[Batch]):
    """One process's share of each step's batch: rows ``rank * b`` to ``(rank + 1) * b - 1`` of the global batch.

    All that is drawn is a function of (seed, step, row of the global batch), so the global batch is the same for any
    number of processes and workers.
    """

    def __init__(
        self, sources: Sequence[Source], order: Order, collate: Collator, config: DataConfig, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        if order.batch_size % world:
            raise ValueError(f"batch_size: got {order.batch_size}, wanted a multiple of the {world} processes")
        share = order.batch_size // world
        self.sources, self.order, self.collate, self.config = list(sources), order, collate, config
        self.share = np.arange(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        source, number = self.order.rows(step)
        skipped: list[Skip] = []
        samples = [self._read(step, int(row), int(source[row]), int(number[row]), skipped) for row in self.share]
        texts, questions = self._texts(samples, step), self._questions(samples, step)
        batch = self.collate([Row(*row) for row in zip(samples, texts, questions, strict=True)])
        for asked, change, purpose, count in (
            (self.config.restyle, restyle, STYLE, RESTYLE_DICE), (self.config.augment, shake, PICTURE, DICE)
        ):  # fmt: skip
            if asked:
                drawn = dice(self.order.seed, step, self.share, purpose, count)
                batch["images"] = _changed(change, batch["images"], drawn)
        return {**batch, "step": step, "skipped": skipped}

    def _read(self, step: int, row: int, source: int, number: int, skipped: list[Skip]) -> Sample:
        """The row's sample, or the next good one in its place."""
        origin = self.sources[source]
        for attempt in range(min(len(origin), TRIES)):
            if attempt:
                number = self.order.spare(step, row, attempt)
            try:
                return origin.read(number)
            except (BadImage, OSError) as error:
                skipped.append(Skip(origin.name, origin.key(number), reason_of(error)))
        found = ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).most_common(3))
        raise ValueError(f"sources: got {origin.name} with nothing readable in {attempt + 1} samples ({found})")

    def _texts(self, samples: Sequence[Sample], step: int) -> list[str]:
        """Captions, every second one on average with random tags behind it."""
        if not self.config.keywords or not any(sample.tags for sample in samples):
            return [sample.caption for sample in samples]
        drawn = dice(self.order.seed, step, self.share, TEXT, 1 + KEYWORDS)
        return [
            " ".join([sample.caption, *_some(sample.tags, row[1:])]) if row[0] < 0.5 else sample.caption
            for sample, row in zip(samples, drawn, strict=True)
        ]

    def _questions(self, samples: Sequence[Sample], step: int) -> list[tuple[str, str] | None]:
        drawn = dice(self.order.seed, step, self.share, QUESTION, 1)[:, 0]
        return [
            sample.questions[int(at * len(sample.questions))] if sample.questions else None
            for sample, at in zip(samples, drawn, strict=True)
        ]


def _changed(change: Callable[[Tensor, Tensor], Tensor], images: Tensor, drawn: np.ndarray) -> Tensor:
    numbers = torch.from_numpy(drawn).T.mul(2).sub(1).float()
    parts = zip(images.split(_AT_ONCE), numbers.split(_AT_ONCE, 1), strict=True)
    return torch.cat([change(*part) for part in parts]).contiguous()


def _some(words: Sequence[str], drawn: np.ndarray) -> list[str]:
    """As many different words as there are numbers, if there are."""
    left = list(words)
    return [left.pop(int(at * len(left))) for at in drawn if left]


class Loader:
    """Iterates over the batches of steps ``start`` to ``stop - 1``, ``batch_size / world`` rows each.

    The rows of a step depend on the data's seed, the batch size, the weights and the step, so a run resumes by its
    step. What had to be skipped is in ``skipped``, and ``skips`` counts it by (source, reason); a sample counts once,
    however often its turn comes.

    Args:
        data: of the run.
        batch_size: of all processes together.
        rank, world: this process among those that share the batch.
        start, stop: steps.
        weights: one a source, instead of the configured ones; 0 leaves a source out.

    Raises:
        ValueError: a batch size that the processes or the sources cannot divide.
    """

    def __init__(
        self, data: Data, batch_size: int, rank: int = 0, world: int = 1, start: int = 0, stop: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        parts, config = [source.train for source in data.sources], data.config
        order = Order(
            [part.name for part in parts], [part.ids for part in parts],
            weights or [source.weight for source in config.sources], batch_size, data.seed, config.mix,
            config.no_duplicates,
        )  # fmt: skip
        self.steps = Steps(parts, order, data.collate, config, rank, world)
        self.start, self.stop, self.config = start, stop, config
        self.skipped: list[Skip] = []
        self._seen: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        workers = self.config.workers
        options: dict[str, Any] = {"prefetch_factor": self.config.prefetch} if workers else {}
        # a generator of its own: starting workers must not draw from the one that dropout uses
        loader = DataLoader(
            self.steps, batch_size=None, sampler=range(self.start, self.stop), num_workers=workers, collate_fn=_same,
            pin_memory=self.config.pin_memory, generator=torch.Generator(), worker_init_fn=_undisturbed, **options,
        )  # fmt: skip
        for batch in loader:
            self._note([Skip(*skip) for skip in batch.pop("skipped")])
            yield batch

    @property
    def skips(self) -> Counter[tuple[str, str]]:
        """How many samples of each source were skipped for each reason."""
        return Counter((skip.source, skip.reason) for skip in self.skipped)

    def _note(self, skipped: Sequence[Skip]) -> None:
        for skip in skipped:
            if (skip.source, skip.key) in self._seen:
                continue
            self._seen.add((skip.source, skip.key))
            self.skipped.append(skip)
            if len(self.skipped) <= SHOWN:
                last = " (further ones are only counted)" if len(self.skipped) == SHOWN else ""
                print(f"skipped {skip.key} of {skip.source}: {skip.reason}{last}", flush=True)


def _undisturbed(worker: int) -> None:
    """A signal to the whole group of processes is for the one that trains: it still needs its workers to finish."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _same(batch: Any) -> Any:
    return batch
