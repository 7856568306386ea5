"""The emoji set: join, cache and fall-back, on a tiny fake tree and without any network."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile

import numpy as np
import pytest

from fastvlm_loss.data import emoji, load, npm, shapes

Image = pytest.importorskip("PIL.Image")

TABLE = """emoji,hexcode,annotation,tags,openmoji_tags,skintone_base_hexcode
x,2764-FE0F,red  heart,"heart, love , red heart","emotion, love",
x,1F44B,waving hand,"hello, wave",hand,
x,1F44B-1F3FB,waving hand: light skin tone,,,1F44B
x,0023-FE0F-20E3,keycap: #,keycap,,
x,1F600,never drawn,face,,
"""
TREES = {
    "emoji-datasource-google@16.0.0": {
        "img/google/64/2764-fe0f.png": (255, 0, 0),
        "img/google/64/1f44b.png": (9, 9, 9),
    },
    "emoji-datasource-twitter@16.0.0": {"img/twitter/64/2764.png": (200, 0, 0), "img/apple/64/1f44b.png": (1, 1, 1)},
    "openmoji@17.0.0": {"color/svg/1F44B-1F3FB.svg": (80, 80, 0)},
    "@lobehub/fluent-emoji-3d@1.1.0": {
        "assets/1f44b-1f3fb.webp": (0, 0, 99),
        "assets/23-20e3.webp": (0, 99, 0),
        "assets/1f999.webp": (0, 0, 0),
        "assets/2764.webp": b"broken",
    },
}


def content(name: str, colour) -> bytes:
    if isinstance(colour, bytes):
        return colour
    if name.endswith(".svg"):
        shape = '<rect width="9" height="9" fill="rgb({},{},{})"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{shape}</svg>'
        return svg.format(*colour).encode()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "WEBP" if name.endswith("webp") else "PNG", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path):
    made = {}
    for number, (package, tree) in enumerate(TREES.items()):
        made[package] = tmp_path / f"{number}.tgz"
        files = {name: content(name, colour) for name, colour in tree.items()}
        if package.startswith("openmoji"):
            files["data/openmoji.csv"] = TABLE.encode()
        with tarfile.open(made[package], "w:gz") as tar:
            for name, data in files.items():
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return made


def fake_npm(folder, script: str):
    """An executable called npm that is found first."""
    folder.mkdir()
    npm_file = folder / "npm"
    npm_file.write_text(f"#!/bin/sh\n{script}\n")
    npm_file.chmod(npm_file.stat().st_mode | stat.S_IEXEC)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_key_ignores_variation_selectors_leading_zeros_case_and_separators():
    assert emoji.key("0023-FE0F-20E3") == emoji.key("23-20e3") == (0x23, 0x20E3)
    assert emoji.key("1f3f4-e0067_e0062") == emoji.key("1F3F4-E0067-E0062")


def test_table_gives_variants_the_tags_of_their_base():
    entries = emoji.read_table(TABLE)
    assert entries[emoji.key("2764")] == emoji.Entry("red heart", ("heart", "love", "emotion"))
    assert entries[emoji.key("1F44B-1F3FB")] == emoji.Entry("waving hand: light skin tone", ("hello", "wave", "hand"))


def test_cache_joins_pictures_and_table(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)  # without resvg-py: OpenMoji is left out
    emoji.write(tmp_path / "cache", archives)
    table = json.loads((tmp_path / "cache" / "pairs.json").read_text())
    images = np.load(tmp_path / "cache" / "images.npy")
    assert table["styles"] == ["Noto", "Noto", "Twemoji", "Fluent 3D", "Fluent 3D"]
    assert table["captions"] == ["red heart", "waving hand", "red heart", "keycap: #", "waving hand: light skin tone"]
    assert [image[0, 0].tolist() for image in images] == [
        [255, 0, 0],
        [9, 9, 9],
        [200, 0, 0],
        [0, 99, 0],
        [0, 0, 99],
    ] or ([max(image[0, 0].tolist()) for image in images] == [255, 9, 200, 99, 99])
    licences = (tmp_path / "cache" / "LICENCES.txt").read_text()
    for licence in ("Apache License 2.0", "CC-BY 4.0", "CC-BY-SA 4.0", "MIT"):
        assert licence in licences


def test_svg_pictures_are_drawn_where_resvg_is_installed(archives, tmp_path):
    pytest.importorskip("resvg_py")
    emoji.write(tmp_path / "cache", archives)
    table = json.loads((tmp_path / "cache" / "pairs.json").read_text())
    at = table["styles"].index("OpenMoji")
    assert table["captions"][at] == "waving hand: light skin tone" and table["tags"][at] == ["hello", "wave", "hand"]
    assert np.load(tmp_path / "cache" / "images.npy")[at, 30, 30].tolist() == [80, 80, 0]


def test_load_fetches_once_and_tests_on_the_unseen_style(archives, tmp_path, monkeypatch):
    calls = []

    def pack(packages, into, timeout):
        calls.append(packages)
        return [archives[package] for package in packages]

    monkeypatch.setattr(npm, "pack", pack)
    monkeypatch.setenv("FASTVLM_LOSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    for _ in range(2):
        splits = emoji.load(size=32)
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["emoji-v1-without-svg"], "nothing temporary is left"
    assert splits.train.captions == ["red heart", "waving hand", "red heart"] and splits.train.ids.tolist() == [0, 1, 0]
    assert splits.test.captions == ["keycap: #", "waving hand: light skin tone"]
    assert splits.train.tags is not None and splits.train.images[[0]].shape == (1, 32, 32, 3)
    assert "Fluent 3D" in splits.note and "LICENCES.txt" in splits.note


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo 'npm error network down' >&2; exit 1", r"could not fetch the emoji pictures \(npm error network down\)"),
        ("exec sleep 60", "did not fetch the emoji pictures within 1 seconds"),
        (None, "npm, which fetches the emoji pictures, is not installed"),
    ],
)
def test_impossible_fetch_says_one_sentence_and_gives_shapes(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script) if script else str(tmp_path))
    monkeypatch.setenv("FASTVLM_LOSS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(npm.FetchError, match=message):
        emoji.load(timeout=1)
    assert not list((tmp_path / "cache").iterdir()), "a failed fetch leaves nothing behind"
    if script != "exec sleep 60":
        monkeypatch.setattr(shapes.load, "__defaults__", (50, 5, 48, 0, None))  # a small set is enough here
        splits = load("emoji", size=16)
        assert splits.note.startswith("The emoji set is not available: npm") and "embedded shapes" in splits.note
        assert splits.train.name == "shapes train"


def test_unwritable_cache_gives_the_same_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVLM_LOSS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(npm.FetchError, match="cannot be written"):
        emoji.load()


def test_pack_reads_the_report_of_every_npm(tmp_path, monkeypatch):
    entry, old = ({"name": "@a/b", "filename": filename} for filename in ("a-b-1.0.0.tgz", "@a/b-1.0.0.tgz"))
    for number, report in enumerate(([entry], {"@a/b": entry}, [old])):
        monkeypatch.setenv("PATH", fake_npm(tmp_path / f"bin{number}", f"echo '{json.dumps(report)}'"))
        assert npm.pack(["@a/b@1.0.0"], tmp_path / "into", 30) == [tmp_path / "into" / "a-b-1.0.0.tgz"]


def test_an_answer_of_npm_that_makes_no_sense(tmp_path, monkeypatch):
    for number, answer in enumerate(("nonsense", "[]", "[1]")):
        monkeypatch.setenv("PATH", fake_npm(tmp_path / f"bin{number}", f"echo '{answer}'"))
        with pytest.raises(npm.FetchError, match="could not be read"):
            npm.pack(["@a/b@1.0.0"], tmp_path / "into", 30)
