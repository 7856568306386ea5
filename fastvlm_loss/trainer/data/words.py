"""What kind of word each word of a caption is, which masking strategies choose by, and how concrete it is."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from .samples import Sample

OBJECT, CONTENT, STOP, ATTRIBUTE = 1, 2, 4, 8  # bits; a word is CONTENT or STOP, an object or attribute also CONTENT
NO_OBJECTS = frozenset(("photo", "image", "picture", "pic", "side", "part", "background"))  # Bitton et al. 2021
_STOP = """
a about above after again all also am an and any are as at be because been before being below between both but
by can could did do does doing down during each few for from further had has have having he her here hers him
his how i if in into is it its itself just may me might more most must my no nor not now of off on once only
or other our out over own same she should so some such than that the their them then there these they this
those through to too under until up upon very was we were what when where which while who whom whose why will
with would you your yours
"""
STOP_WORDS = frozenset(_STOP.split())


class WordKinds:
    """Flags and concreteness (1 to 5) of words, by what a sample says of itself, lists of the user, or stop words.

    ``objects`` is a file of words, one a line; ``concreteness`` a table of words and ratings, by tabs or commas, with
    or without a header (the columns Word and Conc.M of Brysbaert et al. 2014 are found by name).
    """

    def __init__(self, objects: str | None = None, concreteness: str | None = None) -> None:
        self.objects = _named(tuple(_lines("object_words", objects)) if objects else ())
        self.ratings = _ratings(concreteness) if concreteness else {}

    def __call__(self, words: Iterable[str], sample: Sample) -> list[tuple[int, float]]:
        """(flags, concreteness) of each word.

        Object words are those that the sample names; where it names none of them, those of the list.
        """
        words = list(words)
        named = _named(sample.objects)
        if named.isdisjoint(form for word in words for form in forms(word)):
            named = self.objects
        attributes = _named(sample.attributes)
        return [self._kind(word, named, attributes) for word in words]

    def _kind(self, word: str, objects: frozenset[str], attributes: frozenset[str]) -> tuple[int, float]:
        if word in STOP_WORDS or not any(letter.isalnum() for letter in word):
            return STOP, self.ratings.get(word, 1.0)
        flags, rating, possible = CONTENT, 2.0, forms(word)
        if not attributes.isdisjoint(possible):
            flags, rating = flags | ATTRIBUTE, 4.0
        if len(word) > 1 and not objects.isdisjoint(possible) and NO_OBJECTS.isdisjoint(possible):
            flags, rating = flags | OBJECT, 5.0
        return flags, next((self.ratings[form] for form in possible if form in self.ratings), rating)


@lru_cache(maxsize=1 << 16)
def forms(word: str) -> tuple[str, ...]:
    """The word in lower case, and what it could be the plural of: enough to match a class with a caption's word."""
    word = word.strip().lower()
    found = [word]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.append(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes")):
            found.append(word[:-2])
        elif word.endswith("ies"):
            found.append(word[:-3] + "y")
    return tuple(found)


@lru_cache(maxsize=1 << 12)
def _named(names: tuple[str, ...]) -> frozenset[str]:
    """All forms of each word of each name: ``traffic light`` names two."""
    return frozenset(form for name in names for word in name.replace("_", " ").split() for form in forms(word))


def _lines(argument: str, path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({error}), wanted a text file") from error
    return [line for line in text.splitlines() if line.strip()]


def _ratings(path: str) -> dict[str, float]:
    lines = _lines("concreteness", path)
    rows = list(csv.reader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    word = header.index("word") if "word" in header else 0
    rating = next((header.index(name) for name in ("conc.m", "rating", "concreteness") if name in header), 1)
    found: dict[str, float] = {}
    for number, row in enumerate(rows):
        try:
            found[row[word].strip().lower()] = float(row[rating])
        except (IndexError, ValueError):
            if number:  # the first one may be a header
                raise ValueError(
                    f"concreteness: got {path} with the line {lines[number]!r}, wanted a word and a rating"
                ) from None
    if not found:
        raise ValueError(f"concreteness: got {path} without a rating, wanted lines of a word and a rating")
    return found
