"""The embedded procedural set: coloured shapes with captions, boxes, word spans, questions and distractors.

Eight shapes, eight colours, two sizes, four relations, four backgrounds: 262,656 captions with a relation or one
object (and 33,024 with "and"). Every sample is a pure function of (seed, index), so nothing is stored or fetched:

    >>> sample(seed=0, index=7, level=3).scene.caption
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .pairs import Pairs, Splits
from .shapes_draw import RGB, Box, draw
from .shapes_scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Question, Scene, Span, Thing

LEVELS = (1, 2, 3)
LEVEL_SHARES = (0.3, 0.1, 0.6)  # of one object, two objects, two objects with their relation, when level is None
TEST_SHARE = 10  # one caption in ten belongs to the test split
_STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Sample:
    """One picture and all that is known about it; ``boxes`` are (x0, y0, x1, y1) in pixels, half open, per thing."""

    image: np.ndarray
    boxes: list[Box]
    scene: Scene

    @property
    def caption(self) -> str:
        """The scene's caption."""
        return self.scene.caption

    @property
    def spans(self) -> list[Span]:
        """Object words, attribute words and relation, as characters of the caption."""
        return self.scene.spans

    @property
    def questions(self) -> list[Question]:
        """Questions that the picture answers without ambiguity."""
        return self.scene.questions

    @property
    def distractors(self) -> list[str]:
        """Captions of almost the same words that are false of the picture."""
        return self.scene.distractors


def sample(seed: int, index: int, level: int | None = None, size: int = 64) -> Sample:
    """Sample number ``index`` of the series ``seed``, drawn at ``size`` x ``size`` pixels (at least 16).

    ``level``: 1 one object, 2 two objects, 3 two objects and their relation, None a fixed mixture of the three.
    The scene does not depend on ``size``. Raises ValueError for another level, a smaller size or a negative number.
    """
    if size < 16:
        raise ValueError(f"size: got {size}, wanted at least 16 pixels")
    chosen, dice = _scene(seed, index, level)
    image, boxes = draw(size, chosen.background, _place(chosen, dice, size))
    return Sample(image, boxes, chosen)


def scene(seed: int, index: int, level: int | None = None) -> Scene:
    """What ``sample`` would draw, without drawing it (about 20 microseconds)."""
    return _scene(seed, index, level)[0]


def split_of(caption: str) -> str:
    """``"train"`` or ``"test"``: a property of the caption, so no caption is ever in both."""
    return "test" if crc32(caption.encode()) % TEST_SHARE == 0 else "train"


def load(train: int = 40_000, test: int = 1000, size: int = 48, seed: int = 0, level: int | None = None) -> Splits:
    """``train`` training pairs (captions may repeat) and ``test`` pairs with as many different, unseen captions."""
    return Splits(
        _pairs("shapes", seed, level, size, train, "train"),
        _pairs("shapes", seed, level, size, test, "test"),
        note=f"embedded shapes: {train:,} training pairs, {test:,} test pairs with captions never trained on",
    )


class Rendered:
    """Pictures drawn on demand: ``rendered[indices]`` is uint8 [len(indices), size, size, 3]."""

    def __init__(self, seed: int, numbers: list[int], level: int | None, size: int) -> None:
        self.seed, self.numbers, self.level, self.size = seed, numbers, level, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: Tensor) -> Tensor:
        pictures = [sample(self.seed, self.numbers[i], self.level, self.size).image for i in indices.tolist()]
        return (
            torch.from_numpy(np.stack(pictures))
            if pictures
            else torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        )


def _pairs(name: str, seed: int, level: int | None, size: int, count: int, split: str) -> Pairs:
    numbers: list[int] = []
    captions: list[str] = []
    used: set[str] = set()
    index = 0
    while len(captions) < count:
        caption = scene(seed, index, level).caption
        if split_of(caption) == split and not (split == "test" and caption in used):
            numbers.append(index)
            captions.append(caption)
            used.add(caption)
        index += 1
        if index > 100 * count + 10_000:
            raise ValueError(f"test: got {count}, wanted at most {len(captions)}: level {level} has no more captions")
    return Pairs(f"{name} {split}", Rendered(seed, numbers, level, size), captions)


def _scene(seed: int, index: int, level: int | None) -> tuple[Scene, np.ndarray]:
    """The scene, and the uniform numbers left for placing it."""
    if level is not None and level not in LEVELS:
        raise ValueError(f"level: got {level!r}, wanted 1, 2, 3 or None")
    if seed < 0 or index < 0:
        raise ValueError(f"seed, index: got {seed}, {index}, wanted numbers >= 0")
    dice = np.random.default_rng((seed, index)).random(24)
    if level is None:
        level = 1 + int(np.searchsorted(np.cumsum(LEVEL_SHARES[:2]), dice[0], side="right"))
    pick = [words[int(u * len(words))] for words, u in zip((SIZES, COLOURS, SHAPES) * 2, dice[1:7], strict=True)]
    things = (Thing(*pick[:3]), Thing(*pick[3:]))[: 1 if level == 1 else 2]
    relation = RELATIONS[int(dice[7] * 4)] if level == 3 else None
    return Scene(things, relation, BACKGROUNDS[int(dice[8] * 4)]), dice[9:]


def _place(chosen: Scene, dice: np.ndarray, size: int) -> list[tuple[str, tuple[float, float, float], int, int, int]]:
    """Centres, radii and colours in pixels; lone things may be cut by the border, two without relation may overlap."""
    shake = dice * 2 - 1  # uniform in [-1, 1]
    if chosen.relation:
        dx, dy = _STEP[chosen.relation]
        middle = 0.5 + 0.03 * shake[0:2]
        apart, aside = 0.25 + 0.03 * shake[2], 0.14 * shake[3]
        offset = np.array([dx * apart + dy * aside, dy * apart + dx * aside])
        centres = [middle + offset, middle - offset]
    elif len(chosen.things) == 2:
        turn = 2 * np.pi * dice[3]
        offset = (0.19 + 0.05 * shake[2]) * np.array([np.cos(turn), np.sin(turn)])
        middle = 0.5 + 0.06 * shake[0:2]
        centres = [middle + offset, middle - offset]
    else:
        centres = [0.5 + 0.33 * shake[0:2]]
    things = []
    for i, (thing, centre) in enumerate(zip(chosen.things, centres, strict=True)):
        share = (0.13 if thing.size == "small" else 0.23) * (1 + 0.06 * shake[4 + i])
        red, green, blue = (
            min(255.0, max(0.0, c + 14 * s)) for c, s in zip(RGB[thing.colour], shake[6 + 3 * i :], strict=False)
        )
        x, y = (round(float(c) * size) for c in centre)
        things.append((thing.shape, (red, green, blue), x, y, round(share * size)))
    return things
