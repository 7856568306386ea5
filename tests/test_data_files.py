"""Folders, tables and shards of one's own, with broken files among them."""

from __future__ import annotations

import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch

from fastvlm_loss.data import files, load
from fastvlm_loss.data.images import BadImage, decode

Image = pytest.importorskip("PIL.Image")


def picture(colour=(200, 30, 30), size=(20, 20), kind="PNG", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(picture((i, 0, 0)))
        (tmp_path / f"{i:02}.txt").write_text(f" thing  number {i}\n")
    return tmp_path


def test_folder_with_broken_files(folder):
    (folder / "a.png").write_bytes(b"not a picture")
    (folder / "a.txt").write_text("broken")
    (folder / "b.jpg").write_bytes(picture(kind="JPEG")[:200])
    (folder / "b.txt").write_text("cut off")
    (folder / "c.png").write_bytes(picture())
    (folder / "d.png").write_bytes(picture())
    (folder / "d.txt").write_text("  \n")
    (folder / "e.png").write_bytes(picture(size=(200, 100)))
    (folder / "e.txt").write_text("big")
    (folder / "sub").mkdir()
    (folder / "sub" / "f.webp").write_bytes(picture((0, 0, 250), kind="WEBP"))
    (folder / "sub" / "f.txt").write_text("a blue one")
    pairs, skipped = files.read(folder, size=16, max_pixels=10_000)
    assert len(pairs) == 31 and pairs.captions[3] == "thing number 3" and pairs.captions[-1] == "a blue one"
    assert pairs.images[torch.tensor([3])][0, 0, 0].tolist() == [3, 0, 0]
    assert skipped["without a .txt beside it"] == 1 and skipped["without a caption"] == 1
    assert skipped["too many pixels"] == 1 and skipped.total() == 5
    splits = files.load(folder, size=16, max_pixels=10_000)
    assert "skipped 5" in splits.note and "1 too many pixels" in splits.note
    assert len(splits.train) + len(splits.test) == 31
    assert not set(splits.train.captions) & set(splits.test.captions)


@pytest.mark.parametrize("separator, columns", [(",", ("path", "caption")), ("\t", ("Image", "Text"))])
def test_table(folder, separator, columns):
    rows = [separator.join(columns), *(separator.join((f"{i:02}.png", f'"one, or {i}"')) for i in range(30))]
    rows += [separator.join(("missing.png", "gone")), separator.join(("", "nothing"))]
    table = folder / "pairs.csv"
    table.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    pairs, skipped = files.read(table, size=16)
    assert len(pairs) == 30 and pairs.captions[4] == "one, or 4"
    assert skipped == {"with a path that is no file": 2}


def test_table_without_the_columns(folder):
    (folder / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"data: got bad.csv with the columns \['a', 'b'\], wanted one of image, path"):
        files.read(folder / "bad.csv")


def test_shards(tmp_path):
    path = tmp_path / "shards.tar"
    members = {
        "x/000.jpg": picture((0, 200, 0), kind="JPEG"),
        "x/000.txt": b"first",
        "x/000.json": json.dumps({"caption": "not this one"}).encode(),
        "x/001.json": json.dumps({"caption": "second"}).encode(),
        "x/001.webp": picture(kind="WEBP"),
        "x/002.txt": b"no picture",
        "x/003.png": b"broken",
        "x/003.txt": b"third",
        "x/004.png": picture(),
        "x/004.json": b"{",
        "x/005.seg.png": picture(),
        "x/006.png": picture(),
        "x/006.txt": "père".encode(),
    }
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    pairs, skipped = files.read(path, size=16)
    assert pairs.captions == ["first", "second", "père"]
    assert skipped["without a picture"] == 2 and skipped["without a caption"] == 1 and skipped.total() == 4


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar").write_bytes(b"nonsense")
    (tmp_path / "a.mp4").write_bytes(b"")
    for name, message in (
        ("empty", "with no usable pair"),
        ("a.tar", "no readable tar file"),
        ("a.mp4", "wanted a folder"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"data: got .*{name}.*{message}"):
            load(str(tmp_path / name))


def test_transparency_becomes_white_before_resizing():
    clear = decode(picture((0, 0, 0, 0), mode="RGBA"), 16)
    assert clear.min() == 255
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (255, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    edge = decode(buffer.getvalue(), 16)
    assert edge[:, 0].min() == 255 and edge[:, -1].tolist() == [[255, 0, 0]] * 16
    assert edge[..., 0].min() > 240, "no dark fringe where red meets nothing"


@pytest.mark.parametrize(
    "mode, colour", [("P", 3), ("L", 9), ("LA", (9, 255)), ("CMYK", (0, 0, 0, 0)), ("1", 1), ("I;16", 700)]
)
def test_every_mode_decodes(mode, colour):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(picture(colour, mode=mode, kind=kind), 16).shape == (16, 16, 3)


def test_size_of_wide_and_tall_pictures():
    for size in ((90, 10), (10, 90), (1, 1)):
        assert decode(picture(size=size), 32).shape == (32, 32, 3)


def test_pixel_cap_comes_before_decoding():
    header_only = picture(size=(3000, 3000))[:200]  # the pixels themselves are missing
    with pytest.raises(BadImage, match="too many pixels"):
        decode(header_only, 16, max_pixels=1_000_000)
    with pytest.raises(BadImage, match="not a readable picture"):
        decode(header_only, 16)


def test_damaged_archives_and_tables_are_one_line(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        info = tarfile.TarInfo("x/1.txt")
        info.size = 200_000
        tar.addfile(info, io.BytesIO(random.Random(0).randbytes(info.size)))
    (tmp_path / "cut.tar.gz").write_bytes(whole.getvalue()[:100_000])
    (tmp_path / "text.tar").write_text("no archive\n" * 100)
    (tmp_path / "long.csv").write_text("image,caption\na.png," + "x" * 200_000 + "\n")
    for name in ("cut.tar.gz", "text.tar", "long.csv"):
        with pytest.raises(ValueError, match=f"data: got {name}, which is no readable") as caught:
            files.load(tmp_path / name, 48)
        assert "\n" not in str(caught.value)
