"""Emoji pictures in four drawing styles with their names and tags, fetched once; the test split is an unseen style."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import npm
from .images import BadImage, decode
from .pairs import Pairs, Splits

TEST_STYLE = "Fluent 3D"
TIMEOUT = 300.0  # seconds for the four archives (156 MB)
_SIZE = 64  # pixels a side in the cache: what Noto and Twemoji come in
_VERSION = 1  # of the cache's layout


class Style(NamedTuple):
    """One drawing style: the package that has it, where in it the pictures lie, and what its licence asks for."""

    name: str
    package: str
    folder: str
    suffix: str
    licence: str


STYLES = (
    Style(
        "Noto", "emoji-datasource-google@16.0.0", "img/google/64/", ".png",
        "Noto Emoji, copyright Google LLC. Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0). "
        "https://github.com/googlefonts/noto-emoji. Packed by emoji-data, copyright 2013 Cal Henderson, MIT.",
    ),
    Style(
        "Twemoji", "emoji-datasource-twitter@16.0.0", "img/twitter/64/", ".png",
        "Twemoji, copyright Twitter, Inc and other contributors. CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/). https://github.com/jdecked/twemoji. "
        "Packed by emoji-data, copyright 2013 Cal Henderson, MIT.",
    ),
    Style(
        "OpenMoji", "openmoji@17.0.0", "color/svg/", ".svg",
        "OpenMoji, the open-source emoji and icon project, by its contributors. CC-BY-SA 4.0 "
        "(https://creativecommons.org/licenses/by-sa/4.0/). https://openmoji.org. The names and tags are its table's.",
    ),
    Style(
        TEST_STYLE, "@lobehub/fluent-emoji-3d@1.1.0", "assets/", ".webp",
        "Fluent Emoji, copyright Microsoft Corporation. MIT. https://github.com/microsoft/fluentui-emoji. "
        "Packed by LobeHub, MIT.",
    ),
)  # fmt: skip
_TABLE = ("openmoji@17.0.0", "data/openmoji.csv")


class Entry(NamedTuple):
    """What the table says of one emoji."""

    caption: str
    tags: tuple[str, ...]


def load(size: int = 48, test: int = 1000, seed: int = 0, timeout: float = TIMEOUT) -> Splits:
    """Noto, Twemoji and OpenMoji to train on, ``test`` Fluent 3D pictures (chosen by ``seed``) to test on.

    Fetches, decodes and caches on the first call (about a minute; then a second). Raises ``npm.FetchError``
    where that is impossible.
    """
    cache = cache_folder() / f"emoji-v{_VERSION}{'' if _draws_svg() else '-without-svg'}"
    if not (cache / "pairs.json").is_file():
        build(cache, timeout)
    table = json.loads((cache / "pairs.json").read_text(encoding="utf-8"))
    images = np.load(cache / "images.npy", mmap_mode="r")
    styles = np.array(table["styles"])
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(styles == TEST_STYLE))[:test]
    train = _pairs("emoji train", images, table, np.flatnonzero(styles != TEST_STYLE), size)
    unseen = _pairs("emoji test", images, table, np.sort(chosen), size)
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(*np.unique(styles, return_counts=True), strict=True))
    note = (
        f"emoji: {len(train):,} training pictures, {len(unseen):,} test pictures in a style never trained on "
        f"({TEST_STYLE}); fetched: {counts}; licences: {cache / 'LICENCES.txt'}"
    )
    return Splits(train, unseen, note)


def cache_folder() -> Path:
    """``$FASTVLM_LOSS_CACHE``, or ``~/.cache/fastvlm_loss``."""
    chosen = os.environ.get("FASTVLM_LOSS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fastvlm_loss"


def build(cache: Path, timeout: float) -> None:
    """Fetch the archives and make ``cache``: images.npy, pairs.json, LICENCES.txt. It appears whole or not at all."""
    work = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{cache.name}.tmp-", dir=cache.parent))
        print("Fetching the emoji pictures (156 MB, once) ...", file=sys.stderr, flush=True)
        archives = npm.pack([style.package for style in STYLES], work / "archives", timeout)
        write(work / "new", {style.package: archive for style, archive in zip(STYLES, archives, strict=True)})
        (work / "new").replace(cache)
    except OSError as error:
        if not (cache / "pairs.json").is_file():  # otherwise another process was faster: its copy is as good
            raise npm.FetchError(f"the cache folder {cache.parent} cannot be written ({error.strerror})") from None
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)


def write(folder: Path, archives: Mapping[str, Path]) -> None:
    """Decode what is in the archives (package to file) and write the cache's three files into ``folder``."""
    package, table = _TABLE
    entries = read_table(
        next(content for _, content in npm.members(archives[package], table)).decode("utf-8", "replace")
    )
    images, captions, tags, styles = [], [], [], []
    for style in STYLES:
        if style.suffix == ".svg" and not _draws_svg():
            print(
                f"{style.name} is left out: drawing its SVG files needs resvg-py (pip install resvg-py).",
                file=sys.stderr,
            )
            continue
        for entry, image in join(npm.members(archives[style.package], style.folder, style.suffix), entries):
            images.append(image)
            captions.append(entry.caption)
            tags.append(entry.tags)
            styles.append(style.name)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", np.stack(images))
    lines = [f"{style.name} ({style.package}): {style.licence}\n" for style in STYLES]
    changes = f"Changes made: drawn or resized to {_SIZE} x {_SIZE} pixels and put on a white background.\n"
    (folder / "LICENCES.txt").write_text("\n".join([*lines, changes]), encoding="utf-8")
    (folder / "pairs.json").write_text(
        json.dumps({"captions": captions, "tags": tags, "styles": styles}), encoding="utf-8"
    )


def _draws_svg() -> bool:
    return find_spec("resvg_py") is not None


def read_table(text: str) -> dict[tuple[int, ...], Entry]:
    """OpenMoji's table by hex code; a skin-tone variant, which has no tags, takes those of the emoji it varies."""
    rows = {key(row["hexcode"]): row for row in csv.DictReader(io.StringIO(text))}
    entries = {}
    for code, row in rows.items():
        named = row if row["tags"].strip() else rows.get(key(row["skintone_base_hexcode"] or ""), row)
        caption = " ".join(row["annotation"].split())
        both = f"{named['tags']},{named['openmoji_tags']}".split(",")
        tags = dict.fromkeys(tag for tag in (" ".join(t.split()) for t in both) if tag and tag != caption)
        entries[code] = Entry(caption, tuple(tags))
    return entries


def key(hexcode: str) -> tuple[int, ...]:
    """Code points of ``1F468-200D-2764-FE0F`` without the variation selector, which the sets put differently."""
    points = [int(point, 16) for point in hexcode.replace("_", "-").split("-") if point]
    return tuple(point for point in points if point != 0xFE0F)


def join(
    pictures: Iterator[tuple[str, bytes]],
    entries: Mapping[tuple[int, ...], Entry],
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Pair each picture (``<hexcode>.png``, content) with its table entry, in order of the code.

    Pictures without an entry and unreadable ones are left out; so are SVGs that resvg refuses.
    """
    by_code = sorted((key(name.partition(".")[0]), name, content) for name, content in pictures)
    for code, name, content in by_code:
        if code not in entries:
            continue
        try:
            yield entries[code], decode(rasterise(content) if name.endswith(".svg") else content, _SIZE)
        except BadImage:
            continue


def rasterise(svg: bytes) -> bytes:
    """Draw an SVG at the cache's size, as PNG bytes. Raises BadImage where it cannot be drawn."""
    import resvg_py  # type: ignore[import-not-found, unused-ignore]

    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode("utf-8"), width=_SIZE, height=_SIZE))
    except ValueError as error:
        raise BadImage(f"not a drawable SVG ({error})") from error


def _pairs(name: str, images: np.ndarray, table: dict[str, list[Any]], chosen: np.ndarray, size: int) -> Pairs:
    at = chosen.tolist()
    pictures = resized(torch.from_numpy(images[chosen]), size)
    return Pairs(name, pictures, [table["captions"][i] for i in at], [table["tags"][i] for i in at])


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, 3] to uint8 [N, size, size, 3], anti-aliased, a thousand at a time."""
    if images.shape[1:3] == (size, size):
        return images
    parts = [
        torch.nn.functional.interpolate(part.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
        for part in torch.split(images, 1000)
    ]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()
