"""From a path to a source: shapes, emoji, a folder, a table, shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from .config import DataConfig, SourceConfig
from .embedded import open_emoji, open_shapes
from .files import open_files
from .samples import Opened, all_of
from .shards import open_shards

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"[*?\[]")
_WANTED = "wanted shapes, emoji, a folder, a .csv or .tsv table, or .tar shards"


def open_source(source: SourceConfig, config: DataConfig, seed: int, place: int) -> Opened:
    """Open ``source``, the ``place``-th of its run. Raises ValueError with the path and what is wrong with it."""
    if source.path in ("shapes", "emoji"):
        if source.evaluation is not None:
            raise ValueError(f"evaluation: got {source.evaluation}, wanted none: {source.path} has held-out pairs")
        return (
            open_shapes(source, config.size, seed, place) if source.path == "shapes" else open_emoji(config.size, place)
        )
    try:
        found = _on_disk(source, config, place)
        if source.evaluation is None:
            return found
        other = _on_disk(replace(source, path=source.evaluation), config, place)
    except OSError as error:
        raise ValueError(f"sources: got {source.path}, which cannot be read ({error})") from error
    train, held = all_of(found.train.whole, place), all_of(other.train.whole, place)
    return Opened(train, held, [*found.skipped, *other.skipped])


def _on_disk(source: SourceConfig, config: DataConfig, place: int) -> Opened:
    shards = _shards(source.path)
    if shards:
        found = open_shards(source.path, shards, config.size, config.max_pixels, place)
    else:
        path = Path(source.path)
        if not path.exists():
            raise ValueError(f"sources: got {source.path}, which does not exist; {_WANTED}")
        if not path.is_dir() and path.suffix.lower() not in (".csv", ".tsv"):
            raise ValueError(f"sources: got the file {source.path}, {_WANTED} (not compressed)")
        found = open_files(source, config.size, config.max_pixels, place)
    if not len(found.train) + len(found.held):
        examples = "; ".join(f"{skip.key}: {skip.reason}" for skip in found.skipped[:3]) or "nothing of the kind in it"
        raise ValueError(f"sources: got {source.path} with no usable pair ({examples}), wanted pictures with captions")
    return found


def _shards(path: str) -> list[Path]:
    """The .tar files that a path stands for, in order; none where it stands for something else."""
    if _BRACES.search(path):
        files = [Path(name) for name in _expanded(path)]
        missing = list(islice((file for file in files if not file.is_file()), 1))
        if missing:
            raise ValueError(f"sources: got {path}, of which {missing[0]} does not exist")
        return files
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    if Path(path).suffix != ".tar":
        return []
    if Path(path).is_file():
        return [Path(path)]
    fixed = next((parent for parent in Path(path).parents if not _MAGIC.search(str(parent))), Path())
    return sorted(fixed.glob(str(Path(path).relative_to(fixed)))) if _MAGIC.search(path) else []


def _expanded(path: str) -> Iterator[str]:
    """``{000..123}`` counted out, with the leading zeros of its first number."""
    found = _BRACES.search(path)
    if not found:
        yield path
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{path[: found.start()]}{number:0{len(first)}}{path[found.end() :]}")
