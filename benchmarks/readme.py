"""The README's benchmark blocks, generated from the saved results."""

from __future__ import annotations

from pathlib import Path

from . import ablations, negatives
from .dropin import __main__ as dropin
from .report import markdown
from .store import RESULTS, load, render

__all__ = ["END", "README", "START", "block", "splice", "update"]

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
NEGATIVES = "<!-- negatives:start -->", "<!-- negatives:end -->"
TRAINER = "<!-- trainer:start -->", "<!-- trainer:end -->"
DROPIN = "<!-- dropin:start -->", "<!-- dropin:end -->"


def update(check: bool = False) -> bool:
    """Redraw all saved results and rewrite the blocks, or only look (`check`); whether the README was up to date."""
    before = README.read_text() if README.exists() else ""
    after = splice(splice(before, block()), negatives.block(), *NEGATIVES)
    after = splice(splice(after, dropin.block(), *DROPIN), ablations.block(), *TRAINER)
    if not check:
        for path in sorted(RESULTS.glob("*.json")):
            render(path)
        README.write_text(after)
    return before == after


def block(folder: Path = RESULTS) -> str:
    """What stands between the README's markers: every saved result, with its pictures."""
    return "\n\n".join(markdown(load(path), "benchmarks/results/") for path in sorted(folder.glob("*.json")))


def splice(readme: str, text: str, start: str = START, end: str = END) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    if start not in readme or end not in readme:
        raise ValueError(f"README: got no markers, wanted {start} and {end}")
    return f"{readme.partition(start)[0]}{start}\n{text}\n{end}{readme.partition(end)[2]}"
