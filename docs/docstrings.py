"""Docstrings as Markdown: Google sections, argument lists, indented code."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

__all__ = ["FIRST", "Doc", "arguments", "described", "of", "prose", "signature"]

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source):[ \t]*", re.M)
FIRST = "Use it "  # how the paragraph that says when to use something begins


@dataclass(frozen=True)
class Doc:
    """A docstring in parts: summary, the paragraph "Use it ...", other paragraphs, sections by name."""

    summary: str
    when: str
    notes: tuple[str, ...]
    sections: dict[str, str]


def of(thing: Any) -> Doc:
    """The docstring of a function, class or module."""
    head, *rest = SECTION.split(inspect.getdoc(thing) or "")
    summary, *paragraphs = re.split(r"\n\s*\n", head.strip())
    when = [p for p in paragraphs if p.startswith(FIRST)]
    notes = tuple(p for p in paragraphs if not p.startswith(FIRST))
    named = zip(rest[::2], rest[1::2], strict=True)
    return Doc(summary, "\n\n".join(when), notes, {name: textwrap.dedent(text.rstrip()) for name, text in named})


def prose(text: str) -> str:
    """A paragraph on one line; what is indented becomes code, what looks like a tag is escaped."""
    if text.startswith("    "):
        return f"```python\n{textwrap.dedent(text).rstrip()}\n```"
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def arguments(text: str, function: Any = None) -> list[str]:
    """A Markdown list of an Args or Attributes section, with the defaults of `function`."""
    found = []
    for names, meaning in _entries(text):
        shown = ", ".join(f"`{name}{_default(name, function)}`" for name in names)
        found.append(f"- {shown}: {prose(meaning)}")
    return found


def signature(function: Any) -> str:
    """Names and defaults, without types."""
    given = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in given.parameters.values() if p.name != "self"]
    line = f"{function.__name__}{given.replace(parameters=bare, return_annotation=given.empty)}"
    return "\n".join(textwrap.wrap(line, 116, subsequent_indent="    ", break_long_words=False))


def described(text: str) -> list[str]:
    """Names that an Args section gives a meaning."""
    return [name.lstrip("*") for names, _ in _entries(text) for name in names]


def _entries(text: str) -> list[tuple[list[str], str]]:
    entries = [entry.partition(":") for entry in re.split(r"\n(?=\S)", textwrap.dedent(text.strip("\n")))]
    return [(names.split(", "), meaning) for names, _, meaning in entries]


def _default(name: str, function: Any) -> str:
    known = {} if function is None else inspect.signature(function).parameters
    found = known.get(name)
    return "" if found is None or found.default is found.empty else f"={found.default!r}"
