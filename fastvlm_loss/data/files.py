"""Your own pairs: a folder of pictures with .txt beside them, a csv table, or webdataset shards (.tar)."""

from __future__ import annotations

import csv
import json
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from .images import MAX_PIXELS, BadImage, decode
from .pairs import Pairs, Splits, split_by_caption

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
IMAGE_COLUMNS = ("image", "path", "filepath", "file", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "text", "title", "description")
UNREADABLE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)  # what a broken tar file raises
_AT_ONCE = 1024  # encoded pictures held in memory while they are decoded
T = TypeVar("T")


class Found(NamedTuple):
    """A pair as found: an encoded picture (bytes or its path) and a caption, or why there is none."""

    image: bytes | Path | None
    caption: str
    problem: str | None = None


def load(path: str | Path, size: int = 48, max_pixels: int = MAX_PIXELS, test: int = 1000) -> Splits:
    """Read every pair of a folder, a ``.csv``/``.tsv`` table or a ``.tar`` of shards; hold out captions to test.

    Pictures are decoded once to uint8 [size, size, 3] and kept in memory (6.9 kB each at 48 pixels). What cannot be
    read is skipped and counted in the note. Raises ValueError for a path of another kind or without any pair.
    """
    pairs, skipped = read(path, size, max_pixels)
    train_pairs, test_pairs = split_by_caption(pairs, limit=test)
    note = f"{path}: {len(train_pairs):,} training pairs, {len(test_pairs):,} test pairs with captions never trained on"
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        note += f"; skipped {skipped.total():,}: {reasons}"
    return Splits(train_pairs, test_pairs, note)


def read(path: str | Path, size: int = 48, max_pixels: int = MAX_PIXELS) -> tuple[Pairs, Counter[str]]:
    """All usable pairs of ``path`` in a fixed order, and how many were skipped for each reason."""
    path = Path(path)
    found = _source(path)
    skipped: Counter[str] = Counter()
    images: list[np.ndarray] = []
    captions: list[str] = []

    def decoded(item: Found) -> np.ndarray | str:
        if item.problem or item.image is None:
            return item.problem or "without a picture"
        try:
            return decode(item.image, size, max_pixels)
        except BadImage as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:  # Pillow decodes outside the interpreter lock
        while block := list(islice(found, _AT_ONCE)):
            for item, image in zip(block, pool.map(decoded, block), strict=True):
                caption = " ".join(item.caption.split())
                if isinstance(image, str):
                    skipped[image] += 1
                elif not caption:
                    skipped["without a caption"] += 1
                else:
                    images.append(image)
                    captions.append(caption)
    if not captions:
        reasons = ", ".join(f"{n} {why}" for why, n in skipped.most_common()) or "nothing of the kind in it"
        raise ValueError(f"data: got {path} with no usable pair ({reasons}), wanted pictures with captions")
    return Pairs(path.name, torch.from_numpy(np.stack(images)), captions), skipped


def _source(path: Path) -> Iterator[Found]:
    if path.is_dir():
        return in_folder(path)
    if not path.is_file():
        raise ValueError(f"data: got {path}, which does not exist; wanted shapes, emoji, a folder, a .csv or a .tar")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(path)
    if ".tar" in [suffix.lower() for suffix in path.suffixes]:
        return _shards(path)
    raise ValueError(f"data: got the file {path.name}, wanted a folder, a .csv or .tsv table, or a .tar of shards")


def in_folder(path: Path) -> Iterator[Found]:
    """The pictures below a folder, by name, with the .txt beside each."""
    for image in sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        text = image.with_suffix(".txt")
        if text.is_file():
            yield Found(image, text.read_text(encoding="utf-8", errors="replace"))
        else:
            yield Found(image, "", "without a .txt beside it")


def _table(path: Path) -> Iterator[Found]:
    for file, caption in rows(path):
        yield Found(file, caption) if file.is_file() else Found(None, "", "with a path that is no file")


def rows(
    path: Path, separator: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[tuple[Path, str]]:
    """Path (from the table's folder) and caption of each row; separator and columns are found if not given.

    Raises ValueError for a table without these columns, or that cannot be read.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        found = csv.DictReader(lines, delimiter=separator or ("\t" if "\t" in header else ","))
        names = {(name or "").strip().lower(): name for name in found.fieldnames or ()}
        images = (image_column.lower(),) if image_column else IMAGE_COLUMNS
        captions = (caption_column.lower(),) if caption_column else CAPTION_COLUMNS
        image = next((names[c] for c in images if c in names), None)
        caption = next((names[c] for c in captions if c in names), None)
        if image is None or caption is None:
            raise ValueError(
                f"data: got {path.name} with the columns {list(names)}, wanted one of {', '.join(images)} "
                f"and one of {', '.join(captions)}"
            )
        for row in _readable(found, path):
            yield path.parent / (row[image] or "").strip(), row[caption] or ""


def _readable(rows: Iterable[dict[str, str]], path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(f"data: got {path.name}, which is no readable table ({error})") from error


def _shards(path: Path) -> Iterator[Found]:
    try:
        with tarfile.open(path) as tar:

            def read(member: tarfile.TarInfo, suffix: str) -> bytes:
                file = tar.extractfile(member) if _is_image(suffix) or suffix in ("txt", "json") else None
                return file.read() if file else b""

            for _, found in grouped(tar, read):
                image = next((content for suffix, content in found.items() if _is_image(suffix)), None)
                text = found.get("txt", b"").decode("utf-8", "replace")
                yield _sample(image, text or caption_in(found.get("json", b"")))
    except UNREADABLE as error:
        raise ValueError(f"data: got {path.name}, which is no readable tar file ({first_line(error)})") from error


def grouped(
    tar: tarfile.TarFile, take: Callable[[tarfile.TarInfo, str], T]
) -> Iterator[tuple[str, dict[str, T]]]:  # fmt: skip
    """Key of each sample, and what ``take`` makes of its members (as they pass by) by their lower-case suffixes.

    Members of one sample stand together and share the name up to the first dot of the file name (webdataset).
    """
    key: str | None = None
    found: dict[str, T] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if f"{folder}/{stem}" != key:
            if key is not None:
                yield key, found
            key, found = f"{folder}/{stem}", {}
        found[suffix.lower()] = take(member, suffix.lower())
    if key is not None:
        yield key, found


def _is_image(suffix: str) -> bool:
    return f".{suffix}" in IMAGE_SUFFIXES


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _sample(image: bytes | None, caption: str) -> Found:
    return Found(image, caption, None if image is not None else "without a picture")


def caption_in(document: bytes) -> str:
    """The caption in a JSON document, or nothing."""
    try:
        fields = json.loads(document)
    except ValueError:
        return ""
    return (
        next((str(fields[name]) for name in CAPTION_COLUMNS if fields.get(name)), "")
        if isinstance(fields, dict)
        else ""
    )
