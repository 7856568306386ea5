"""Writes the generated parts: docs/losses.md and the README's table of losses; `--check` only looks.

python -m docs.make && python -m docs.gradients
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.readme import splice

from . import page

__all__ = ["COMMAND", "END", "PAGE", "README", "START", "made", "stale"]

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "losses.md"
START, END = "<!-- losses:start -->", "<!-- losses:end -->"
COMMAND = "python -m docs.make"


def made() -> dict[Path, str]:
    """What each file with generated parts should hold."""
    return {PAGE: page.losses(), README: splice(README.read_text(), page.table("docs/losses.md#"), START, END)}


def stale() -> list[Path]:
    """The files that hold something else."""
    return [path for path, text in made().items() if not path.exists() or path.read_text() != text]


def main(check: bool) -> int:
    """Write what is stale, or with `check` name it."""
    files = stale()
    for path in files:
        print(f"{path.relative_to(ROOT)}: {f'stale, run {COMMAND}' if check else 'written'}")
        if not check:
            path.write_text(made()[path])
    return int(check and bool(files))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
