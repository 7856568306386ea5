"""Scenes of the shapes set as values: what is in a picture, and everything that can be said about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "gray", "black", "striped")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Thing(NamedTuple):
    """One object: its size, colour and shape words."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


class Span(NamedTuple):
    """Characters ``caption[start:end]``: one word or relation, its kind, and whose it is (None: the scene's)."""

    start: int
    end: int
    kind: Literal["object", "attribute", "relation"]
    thing: int | None


class Question(NamedTuple):
    """A question with a one-word answer; ``kind`` is colour, shape, size, count or exists."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One or two things, how the first stands to the second (None: not said), and the background.

    Two things without a relation are kept in sorted order, so that equal scenes have equal captions.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def __post_init__(self) -> None:
        if len(self.things) == 2 and self.relation is None:
            object.__setattr__(self, "things", tuple(sorted(self.things)))

    @cached_property
    def caption(self) -> str:
        """For example ``a small red circle left of a large blue star on a white background``."""
        joint = f" {self.relation or 'and'} "
        return joint.join(f"a {thing}" for thing in self.things) + f" on a {self.background} background"

    @cached_property
    def spans(self) -> list[Span]:
        """Where the object words, attribute words and relation stand in the caption, in reading order."""
        spans, at = [], 0

        def add(word: str, kind: Literal["object", "attribute", "relation"], thing: int | None) -> None:
            nonlocal at
            start = self.caption.index(word, at)
            at = start + len(word)
            spans.append(Span(start, at, kind, thing))

        for i, thing in enumerate(self.things):
            if i and self.relation:
                add(self.relation, "relation", None)
            add(thing.size, "attribute", i)
            add(thing.colour, "attribute", i)
            add(thing.shape, "object", i)
        add(self.background, "attribute", None)
        return spans

    @cached_property
    def questions(self) -> list[Question]:
        """Every question of five kinds that this scene answers without ambiguity."""
        things, found = self.things, []
        found.append(Question("how many objects are there", str(len(things)), "count"))
        for i, thing in enumerate(things):
            others = [t for j, t in enumerate(things) if j != i]
            if all(t.shape != thing.shape for t in others):
                found.append(Question(f"what colour is the {thing.shape}", thing.colour, "colour"))
            if all((t.colour, t.shape) != (thing.colour, thing.shape) for t in others):
                found.append(Question(f"what size is the {thing.colour} {thing.shape}", thing.size, "size"))
            found.append(Question(f"is there {_a(thing.colour)} {thing.shape}", "yes", "exists"))
            absent = replace_colour(thing)
            if all((t.colour, t.shape) != (absent.colour, absent.shape) for t in things):
                found.append(Question(f"is there {_a(absent.colour)} {absent.shape}", "no", "exists"))
        if self.relation and things[0] != things[1]:
            first, second = things
            found.append(Question(f"what shape is {self.relation} the {second}", first.shape, "shape"))
            found.append(Question(f"what shape is {OPPOSITE[self.relation]} the {first}", second.shape, "shape"))
        return list(dict.fromkeys(found))

    @cached_property
    def distractors(self) -> list[str]:
        """Captions of almost the same words that are false here: swapped attributes, turned relation, other colour."""
        scenes = []
        if len(self.things) == 2:
            a, b = self.things
            scenes += [
                replace(
                    self, things=(a._replace(**{field: getattr(b, field)}), b._replace(**{field: getattr(a, field)}))
                )
                for field in Thing._fields
            ]
        if self.relation and self.things[0] != self.things[1]:
            scenes.append(replace(self, relation=OPPOSITE[self.relation]))
        scenes += [
            replace(self, things=tuple(replace_colour(t) if i == j else t for j, t in enumerate(self.things)))
            for i in range(len(self.things))
        ]
        return list(dict.fromkeys(scene.caption for scene in scenes if scene != self))


def replace_colour(thing: Thing) -> Thing:
    """The same thing in the next colour but three: far from its own on the colour circle."""
    return thing._replace(colour=COLOURS[(COLOURS.index(thing.colour) + 3) % len(COLOURS)])


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
