"""One sample, and what a source of them is: random access by number, so that the order is nobody's state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np

from ...data.images import BadImage

HELD_OUT = 10  # one caption in ten is evaluated on


@dataclass(frozen=True)
class Sample:
    """A picture and what is said of it.

    ``index`` is the number in its source with the source's number in the bits from 40 on; ``image`` is uint8
    [H, W, 3], or None where only the words were asked for. ``objects`` and ``attributes`` are words known to name what
    is seen (a detector's labels, a drawn scene); ``distractors`` are captions that are false of the picture.
    """

    index: int
    caption: str
    image: np.ndarray | None = None
    tags: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    distractors: tuple[str, ...] = ()


class Skip(NamedTuple):
    """A sample that cannot be used: where it was to be found, and why not."""

    source: str
    key: str
    reason: str


class Source(Protocol):
    """N samples by number."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def ids(self) -> np.ndarray:
        """Hashes of the captions, int64 [N], >= 0: equal captions, equal ids."""
        ...

    def __len__(self) -> int: ...

    def read(self, number: int, picture: bool = True) -> Sample:
        """Sample ``number``. Raises BadImage where it cannot be read."""
        ...

    def key(self, number: int) -> str:
        """What to call it in a message: a file name, a name in a shard."""
        ...


@dataclass(frozen=True)
class Part:
    """Some samples of a source, in the order of ``numbers`` (int64 [n]); their indices stay those of the whole."""

    name: str
    whole: Source
    numbers: np.ndarray
    place: int = 0

    @property
    def ids(self) -> np.ndarray:
        """Caption hashes of the part."""
        found: np.ndarray = self.whole.ids[self.numbers]
        return found

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int, picture: bool = True) -> Sample:
        """Sample ``number`` of the part."""
        found = self.whole.read(int(self.numbers[number]), picture)
        return replace(found, index=self.place << 40 | found.index)

    def key(self, number: int) -> str:
        """As the whole calls it."""
        return self.whole.key(int(self.numbers[number]))


@dataclass(frozen=True)
class Opened:
    """A source as opened: samples to train on, samples held out, and what its index had to leave out."""

    train: Part
    held: Part
    skipped: list[Skip] = field(default_factory=list)

    @property
    def note(self) -> str:
        """One sentence: how many pairs, how many were skipped for which reason, and one of them."""
        text = f"{self.train.name}: {len(self.train):,} training pairs, {len(self.held):,} held out"
        if self.skipped:
            reasons = Counter(skip.reason for skip in self.skipped).most_common()
            text += f"; skipped {len(self.skipped):,}: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons)
            text += f" (the first is {self.skipped[0].key})"
        return text


def clean(caption: str) -> str:
    """The caption with single spaces, and nothing that cannot be encoded (half a surrogate pair in a JSON string)."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def printable(name: str) -> str:
    """A file's name with what is no UTF-8 in it written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def caption_id(caption: str) -> int:
    """A hash of 63 bits of the caption in lower case: the same in every process and run."""
    return int.from_bytes(blake2b(caption.lower().encode(), digest_size=8).digest(), "little") >> 1


def is_held_out(caption: str) -> bool:
    """Whether the caption is one of the tenth that is never trained on: the rule of ``data.split_by_caption``."""
    return crc32(caption.lower().encode()) % HELD_OUT == 0


def all_of(whole: Source, place: int) -> Part:
    """Every sample of a source."""
    return Part(whole.name, whole, np.arange(len(whole)), place)


def split(whole: Source, held: Sequence[bool] | np.ndarray, skipped: list[Skip], place: int) -> Opened:
    """Training and held-out part by one flag a sample."""
    flags = np.asarray(held, bool)
    return Opened(
        Part(whole.name, whole, np.flatnonzero(~flags), place),
        Part(whole.name, whole, np.flatnonzero(flags), place),
        skipped,
    )


def reason_of(error: Exception) -> str:
    """A few words for a message."""
    if isinstance(error, BadImage):
        return str(error)
    return f"not readable ({getattr(error, 'strerror', None) or type(error).__name__})"
