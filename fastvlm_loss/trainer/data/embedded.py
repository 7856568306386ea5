"""The sources of fastvlm_loss.data as random access: shapes, drawn when asked for, and emoji, in memory."""

from __future__ import annotations

from dataclasses import replace
from mmap import mmap
from typing import Any

import numpy as np
import torch

from ...data import emoji, shapes
from ...data.npm import FetchError
from ...data.pairs import Pairs
from .config import SourceConfig
from .samples import Opened, Sample, all_of, caption_id

HELD, HELD_ONE_OBJECT = 1000, 40  # one object: 512 captions in all
KEPT = 1 << 30  # bytes of drawn pictures


class Shapes:
    """Scenes of ``fastvlm_loss.data.shapes``, with object and attribute words and questions.

    What was drawn once is kept (6.9 kB a picture at 48 pixels, up to ``KEPT`` bytes), in memory that forked workers
    share. ``distractors`` also says what is false of each scene.
    """

    def __init__(self, name: str, pairs: Pairs, distractors: bool = False) -> None:
        assert isinstance(pairs.images, shapes.Rendered)
        self.name, self.drawn, self.distractors = name, pairs.images, distractors
        self.ids = np.array([caption_id(caption) for caption in pairs.captions], np.int64)
        self._described: dict[int, Sample] = {}
        self._pictures = self._room()

    def __len__(self) -> int:
        return len(self.drawn)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pictures": None, "_described": {}}  # a worker that is not forked starts empty

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pictures = self._room()

    def read(self, number: int, picture: bool = True) -> Sample:
        """Describe a scene, and draw it."""
        if number not in self._described:
            self._described[number] = self._describe(number)
        found = self._described[number]
        return replace(found, image=self._picture(number)) if picture else found

    def key(self, number: int) -> str:
        """The scene's number."""
        return str(self.drawn.numbers[number])

    def _describe(self, number: int) -> Sample:
        index = self.drawn.numbers[number]
        scene = shapes.scene(self.drawn.seed, index, self.drawn.level)
        named: dict[str, list[str]] = {"object": [], "attribute": [], "relation": []}
        for span in scene.spans:
            named[span.kind].append(scene.caption[span.start : span.end])
        return Sample(
            index, scene.caption, objects=tuple(named["object"]), attributes=tuple(named["attribute"]),
            questions=tuple((asked.question, asked.answer) for asked in scene.questions),
            distractors=tuple(scene.distractors) if self.distractors else (),
        )  # fmt: skip

    def _picture(self, number: int) -> np.ndarray:
        if self._pictures is None:
            return self._draw(number)
        flags, pictures = self._pictures
        if not flags[number]:
            pictures[number] = self._draw(number)
            flags[number] = True
        kept: np.ndarray = pictures[number]
        return kept

    def _draw(self, number: int) -> np.ndarray:
        drawn = self.drawn
        return shapes.sample(drawn.seed, drawn.numbers[number], drawn.level, drawn.size).image

    def _room(self) -> tuple[np.ndarray, np.ndarray] | None:
        shape = (len(self), self.drawn.size, self.drawn.size, 3)
        if not 0 < np.prod(shape) <= KEPT:
            return None
        # anonymous and shared: no page is taken before it is written, and /dev/shm need not be large
        flags = np.frombuffer(mmap(-1, len(self)), bool)
        return flags, np.frombuffer(mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)


class InMemory:
    """Pairs whose pictures are held in memory, with their tags."""

    def __init__(self, name: str, pairs: Pairs, first: int = 0) -> None:
        self.name, self.pairs, self.first = name, pairs, first
        self.ids = np.array([caption_id(caption) for caption in pairs.captions], np.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int, picture: bool = True) -> Sample:
        """Look it up."""
        image = self.pairs.images[torch.tensor([number])][0].numpy() if picture else None
        tags = tuple(self.pairs.tags[number]) if self.pairs.tags else ()
        return Sample(self.first + number, self.pairs.captions[number], image, tags)

    def key(self, number: int) -> str:
        """Its caption."""
        return self.pairs.captions[number]


def open_shapes(config: SourceConfig, size: int, seed: int, place: int) -> Opened:
    """``config.samples`` scenes to train on, and some with captions of their own to evaluate on."""
    held = HELD_ONE_OBJECT if config.level == 1 else HELD
    splits = shapes.load(config.samples, held, size, seed, config.level)
    train, test = Shapes("shapes", splits.train), Shapes("shapes", splits.test, distractors=True)
    return Opened(all_of(train, place), all_of(test, place))


def open_emoji(size: int, place: int) -> Opened:
    """Three styles to train on, a fourth one to evaluate on. Raises ValueError where they cannot be fetched."""
    try:
        splits = emoji.load(size)
    except FetchError as error:
        raise ValueError(f"sources: got 'emoji', which is not available: {error}") from error
    train, test = InMemory("emoji", splits.train), InMemory("emoji", splits.test, first=len(splits.train))
    return Opened(all_of(train, place), all_of(test, place))
