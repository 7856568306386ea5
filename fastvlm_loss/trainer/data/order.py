"""Which samples make the batch of a step: a function of (seed, step), whatever the workers and processes."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch

from ...scores.philox import halves, philox

PICTURE, TEXT, QUESTION, MIX, SOURCE, STYLE = range(6)  # what random words are for


def dice(seed: int, step: int, rows: np.ndarray | Sequence[int], purpose: int, words: int = 4) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 [rows, words]: a function of seed, step, row and purpose alone."""
    low, high = halves(step)
    at = torch.as_tensor(np.asarray(rows, np.int64))
    parts: list[torch.Tensor] = []
    for block in range(-(-words // 4)):
        parts += philox((at, purpose << 16 | block, low, high), halves(seed))
    drawn: np.ndarray = (torch.stack(parts[:words], 1).numpy() + 0.5) * 2.0**-32
    return drawn


def shares(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Rows of each source in a batch by largest remainder: 64 at 80/20 is 51 and 13. Ties go to the earlier source."""
    quotas = [batch_size * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: counts[k] - quotas[k])
    for k in by_remainder[: batch_size - sum(counts)]:
        counts[k] += 1
    return counts


class Order:
    """The rows of every step's global batch, as sample numbers of the sources.

    Each source is walked in permutations of its own, one for each of its epochs, in whole shares of a batch: the last
    ``n % share`` samples of a permutation are dropped.

    Args:
        ids: caption hashes of each source, int64 [n_k].
        weights: of the sources; 0 leaves one out.
        mix: ``sample``: every batch has ``shares(batch_size, weights)`` rows of the sources, in a drawn order;
            ``batch``: the source of each batch is drawn with these probabilities.
        no_duplicates: see ``apart``.

    Raises:
        ValueError: a source with a weight has no row in a batch, or fewer samples than rows.
    """

    def __init__(
        self, names: Sequence[str], ids: Sequence[np.ndarray], weights: Sequence[float], batch_size: int, seed: int,
        mix: str = "sample", no_duplicates: bool = False,
    ) -> None:  # fmt: skip
        if len(weights) != len(ids) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights: got {list(weights)} for {len(ids)} sources, wanted one >= 0 each, some > 0")
        self.ids, self.weights, self.batch_size, self.seed = list(ids), list(weights), batch_size, seed
        self.mix, self.no_duplicates = mix, no_duplicates
        used = [weight > 0 for weight in weights]
        self.counts = shares(batch_size, weights) if mix == "sample" else [batch_size * weight for weight in used]
        for name, count, own, weight in zip(names, self.counts, ids, weights, strict=True):
            if weight > 0 and not 1 <= count <= len(own):
                raise ValueError(
                    f"batch_size: got {batch_size}, which takes {count} rows of {name} at weight {weight:g}, "
                    f"wanted 1 to {len(own)}, its training samples"
                )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._sources = np.empty(0, np.int64)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and number of each row of the global batch, int64 [batch_size] each."""
        source, slot = self._slots(step)
        number = np.empty(self.batch_size, np.int64)
        for k in np.unique(source):
            order, first = self._turn(int(k), step)
            number[source == k] = order[first + slot[source == k]]
        return source, number

    def spare(self, step: int, row: int, attempt: int) -> int:
        """What takes the place of a row that cannot be read: the same row of the next batches of its permutation.

        So two rows never take the same sample before the permutation is used up. Attempts count from 1; those up to
        the source's size - 1 pass all its other samples.
        """
        source, slot = self._slots(step)
        k = int(source[row])
        order, first = self._turn(k, step)
        cycle = len(order) // gcd(len(order), self.counts[k])
        at = first + int(slot[row]) + attempt * self.counts[k] + attempt // cycle
        return int(order[at % len(order)])

    def _slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row, and the row's place in that source's share."""
        if self.mix == "batch":
            return np.full(self.batch_size, self._source(step)), np.arange(self.batch_size)
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        slot = np.concatenate([np.arange(count) for count in self.counts])
        if sum(count > 0 for count in self.counts) > 1:
            mixed = np.argsort(dice(self.seed, step, np.arange(self.batch_size), MIX, 1)[:, 0], kind="stable")
            source, slot = source[mixed], slot[mixed]
        return source, slot

    def _source(self, step: int) -> int:
        self._draw_sources(step)
        return int(self._sources[step])

    def _draw_sources(self, step: int) -> None:
        """The sources of all steps up to this one, for ``mix="batch"``: how often each has had its turn counts."""
        done = len(self._sources)
        if step >= done:
            steps = np.arange(done, max(step + 1, done + 4096))
            edges = np.cumsum(self.weights) / sum(self.weights)
            drawn = np.searchsorted(edges, dice(self.seed, 0, steps, SOURCE, 1)[:, 0], side="right")
            last = max(k for k, weight in enumerate(self.weights) if weight > 0)
            self._sources = np.concatenate([self._sources, np.minimum(drawn, last)])

    def _turn(self, k: int, step: int) -> tuple[np.ndarray, int]:
        """The permutation that source ``k`` is in at a step, and where its share of that batch begins."""
        turn = step
        if self.mix == "batch":
            self._draw_sources(step)
            turn = int((self._sources[:step] == k).sum())
        epoch, at = divmod(turn, len(self.ids[k]) // self.counts[k])
        if self._orders.get(k, (-1,))[0] != epoch:
            order = np.random.default_rng((self.seed, k, epoch)).permutation(len(self.ids[k]))
            if self.no_duplicates:
                order = apart(order, self.ids[k][order], self.counts[k])
            self._orders[k] = (epoch, order)
        return self._orders[k][1], at * self.counts[k]


def apart(order: np.ndarray, ids: np.ndarray, count: int, ahead: int = 8) -> np.ndarray:
    """The same samples, moved so that no ``count`` in a row have equal ids, where ``ahead`` batches of them allow it.

    A sample whose caption the batch has already waits for the next batch. Where more than ``ahead`` batches wait, or
    nothing else is left, the batch is filled up with duplicates.
    """
    waiting, following, out = np.empty(0, np.int64), 0, []
    for _ in range(len(order) // count):
        while True:
            first = np.sort(np.unique(ids[waiting], return_index=True)[1])[:count]
            if len(first) == count or following == len(order) or len(waiting) > ahead * count:
                break
            more = np.arange(following, min(following + count, len(order)))
            waiting, following = np.concatenate([waiting, more]), following + len(more)
        keep = np.ones(len(waiting), bool)
        keep[first] = False
        fill = np.flatnonzero(keep)[: count - len(first)]
        keep[fill] = False
        out.append(waiting[np.concatenate([first, fill])])
        waiting = waiting[keep]
    rest = np.concatenate([waiting, np.arange(following, len(order))])
    return order[np.concatenate([*out, rest])] if out else order
