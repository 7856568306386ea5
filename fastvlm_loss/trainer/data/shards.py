"""Webdataset shards by number: every .tar is scanned once for where its samples lie; samples are read by seeking."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ...data.emoji import cache_folder
from ...data.files import IMAGE_SUFFIXES, UNREADABLE, caption_in, first_line, grouped
from ...data.images import MAX_PIXELS, BadImage, decode
from .files import details
from .samples import Opened, Sample, Skip, caption_id, clean, is_held_out, printable, split

_VERSION = 1  # of the index on the disk


class Index(NamedTuple):
    """Where the usable samples of a shard lie, and what of it is not usable.

    ``places`` int64 [n, 3, 2]: offset and size of picture, .txt and .json (size -1: there is none); ``heads`` int64
    [n]: offset of the picture's header; ``ids`` int64 [n]; ``held`` bool [n]; ``problems`` (key, reason).
    """

    places: np.ndarray
    heads: np.ndarray
    ids: np.ndarray
    held: np.ndarray
    problems: list[tuple[str, str]]


class Shards:
    """The samples of many shards, one after the other, decoded when they are read."""

    def __init__(
        self, name: str, paths: Sequence[Path], indices: Sequence[Index], size: int, max_pixels: int = MAX_PIXELS
    ) -> None:  # fmt: skip
        self.name, self.paths, self.size, self.max_pixels = name, list(paths), size, max_pixels
        self.places = np.concatenate([index.places for index in indices])
        self.heads = np.concatenate([index.heads for index in indices])
        self.ids = np.concatenate([index.ids for index in indices])
        self.ends = np.cumsum([len(index.ids) for index in indices])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, number: int, picture: bool = True) -> Sample:
        """Read a sample's members and decode its picture."""
        image, text, document = self.places[number].tolist()
        with self._shard(number).open("rb") as file:
            content = _content(file, *text).decode("utf-8", "replace")
            fields = _content(file, *document)
            decoded = decode(_content(file, *image), self.size, self.max_pixels) if picture else None
        caption = clean(content) or clean(caption_in(fields))
        if not caption:
            raise BadImage("without a caption, which it had when the shard was scanned")
        return Sample(number, caption, decoded, **details(fields))

    def key(self, number: int) -> str:
        """Shard and member, as the picture's header calls it; its offset where that can be read no more."""
        shard, head = self._shard(number), int(self.heads[number])
        try:
            with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                file.seek(head)
                return printable(f"{shard}:{tarfile.TarInfo.fromtarfile(tar).name}")
        except UNREADABLE:
            return printable(f"{shard}:{head}")

    def _shard(self, number: int) -> Path:
        return self.paths[int(np.searchsorted(self.ends, number, side="right"))]


def _content(file: BinaryIO, offset: int, size: int) -> bytes:
    """That part of a file, or nothing for a member that is not there. Raises BadImage where the file is too short."""
    if size < 0:
        return b""
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise BadImage("cut off")
    return content


def open_shards(name: str, paths: Sequence[Path], size: int, max_pixels: int, place: int) -> Opened:
    """Index the shards (or take their indices from the cache) and split them by the captions' hash.

    A shard that is no tar file is skipped as a whole. Raises ValueError where no shard can be read.
    """
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(indexed, paths))
    skipped = [
        Skip(name, printable(f"{path}:{key}" if key else str(path)), reason)
        for path, index in zip(paths, indices, strict=True)
        for key, reason in index.problems
    ]
    whole = Shards(name, paths, indices, size, max_pixels)
    return split(whole, np.concatenate([index.held for index in indices]), skipped, place)


def indexed(path: Path) -> Index:
    """The index of a shard, from the cache if the shard has the size and the time it had when it was scanned."""
    stat = path.stat()
    stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns])
    name = blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest()
    cached = cache_folder() / "shards" / f"{name}.npz"
    try:
        with np.load(cached, allow_pickle=False) as kept:
            if np.array_equal(kept["stamp"], stamp):
                problems = [(str(key), str(reason)) for key, reason in kept["problems"]]
                return Index(kept["places"], kept["heads"], kept["ids"], kept["held"], problems)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # not there, or not whole: scan again
        pass
    found = scan(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
            np.savez(
                file, stamp=stamp, **{**found._asdict(), "problems": np.array(found.problems, np.str_).reshape(-1, 2)}
            )
        Path(file.name).replace(cached)
    except OSError:  # a cache that cannot be written only costs the next run a scan
        pass
    return found


def scan(path: Path) -> Index:
    """Read a shard's headers and captions."""
    size = path.stat().st_size
    places: list[list[tuple[int, int]]] = []
    heads: list[int] = []
    captions: list[str] = []
    problems: list[tuple[str, str]] = []
    try:
        with path.open("rb") as file, tarfile.open(path, "r:") as tar:
            for key, members in grouped(tar, lambda member, _: member):
                image = next((members[suffix] for suffix in members if f".{suffix}" in IMAGE_SUFFIXES), None)
                if image is None:
                    problems.append((key, "without a picture"))
                    continue
                found = [_place(member) for member in (image, members.get("txt"), members.get("json"))]
                if max(sum(place) for place in found) > size:
                    problems.append((key, "cut off"))
                    continue
                text = _content(file, *found[1]).decode("utf-8", "replace")
                caption = clean(text) or clean(caption_in(_content(file, *found[2])))
                if not caption:
                    problems.append((key, "without a caption"))
                    continue
                places.append(found)
                heads.append(image.offset)
                captions.append(caption)
    except UNREADABLE as error:
        rest = "the rest is" if captions else "it is"
        problems.append(("", f"{rest} no readable tar file ({first_line(error)})"))
    return Index(
        np.array(places, np.int64).reshape(-1, 3, 2),
        np.array(heads, np.int64),
        np.array([caption_id(caption) for caption in captions], np.int64),
        np.array([is_held_out(caption) for caption in captions], bool),
        problems,
    )


def _place(member: tarfile.TarInfo | None) -> tuple[int, int]:
    return (member.offset_data, member.size) if member else (0, -1)
