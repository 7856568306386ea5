"""Pictures in files: a folder with a .txt (and maybe a .json) beside each, or a table of paths and captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...data.files import in_folder, rows
from ...data.images import MAX_PIXELS, decode
from .config import SourceConfig
from .samples import Opened, Sample, Skip, caption_id, clean, is_held_out, printable, split


class Files:
    """Pictures by path, decoded when they are read, with their captions in memory."""

    def __init__(
        self, name: str, paths: list[Path], captions: list[str], size: int, max_pixels: int = MAX_PIXELS,
        sidecars: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.paths, self.captions = name, paths, captions
        self.size, self.max_pixels, self.sidecars = size, max_pixels, sidecars
        self.ids = np.array([caption_id(caption) for caption in captions], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int, picture: bool = True) -> Sample:
        """Open and decode."""
        path = self.paths[number]
        image = decode(path, self.size, self.max_pixels) if picture else None
        beside = path.with_suffix(".json")
        document = beside.read_bytes() if self.sidecars and beside.is_file() else b""
        return Sample(number, self.captions[number], image, **details(document))

    def key(self, number: int) -> str:
        """The picture's path."""
        return printable(str(self.paths[number]))


def details(document: bytes) -> dict[str, Any]:
    """Object words and questions in a JSON document beside a picture, as a Sample's arguments.

    ``"objects"`` (or ``"words"``) is a list of names, ``"questions"`` a list of objects with ``"question"`` and
    ``"answer"``. What is of another form is left out: sidecars of other makers hold many things.
    """
    try:
        fields = json.loads(document) if document else {}
    except ValueError:
        return {}
    if not isinstance(fields, dict):
        return {}
    objects: list[Any] = next((fields[name] for name in ("objects", "words") if isinstance(fields.get(name), list)), [])
    asked = fields.get("questions")
    pairs = [
        (entry.get("question"), entry.get("answer"))
        for entry in (asked if isinstance(asked, list) else ())
        if isinstance(entry, dict)
    ]
    return {
        "objects": tuple(clean(name) for name in objects if isinstance(name, str)),
        "questions": tuple((clean(str(q)), clean(str(a))) for q, a in pairs if q and a is not None),
    }


def open_files(source: SourceConfig, size: int, max_pixels: int, place: int) -> Opened:
    """A folder or a table, its captions split by their hash. Raises ValueError for one without a usable pair."""
    path = Path(source.path)
    if path.is_dir():
        found: Iterable[tuple[Path, str, str | None]] = (
            (Path(str(item.image)), item.caption, item.problem) for item in in_folder(path)
        )
    else:
        columns = source.separator, source.image_column, source.caption_column
        found = ((file, caption, None) for file, caption in rows(path, *columns))
    paths, captions, skipped = [], [], []
    for file, text, problem in found:
        caption = clean(text)
        if problem or not caption:
            skipped.append(Skip(source.path, printable(str(file)), problem or "without a caption"))
        else:
            paths.append(file)
            captions.append(caption)
    whole = Files(source.path, paths, captions, size, max_pixels, path.is_dir())
    return split(whole, [is_held_out(caption) for caption in captions], skipped, place)
