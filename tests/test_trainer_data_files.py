"""Folders, tables and shards as sources: what they give, and that a bad sample is skipped, counted and named."""

import json
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("PIL")

from trainer_data_cases import pairs, picture, same, shard

from fastvlm_loss.trainer.data import CONTENT, OBJECT, Data, DataConfig, Loader, SourceConfig, shards
from fastvlm_loss.trainer.data.samples import is_held_out

PLAIN = DataConfig(size=16, augment=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_LOSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path, config=PLAIN, **options):
    return Data.open(replace(config, sources=(SourceConfig(path=str(path), **options),)))


def everything(data, part="train"):
    """Caption to red value of the picture's first pixel."""
    part = getattr(data.sources[0], part)
    found = [part.read(i) for i in range(len(part))]
    return {sample.caption: int(sample.image[0, 0, 0]) for sample in found}


def numbered(count, first=0):
    return {f"thing number {i}": i for i in range(first, first + count)}


def in_folder(folder, count=40):
    folder.mkdir()
    for name, content in pairs(0, count).items():
        (folder / name).write_bytes(content)
    return folder


def test_folder(tmp_path):
    folder = in_folder(tmp_path / "a")
    (folder / "none.png").write_bytes(picture())
    (folder / "blank.png").write_bytes(picture())
    (folder / "blank.txt").write_text(" \n")
    data = opened(folder)
    train, held = everything(data), everything(data, "held")
    assert train | held == numbered(40) and not train.keys() & held.keys()
    assert all(is_held_out(caption) for caption in held) and len(held) >= 2
    assert {skip.key: skip.reason for skip in data.skipped} == {
        str(folder / "blank.png"): "without a caption",
        str(folder / "none.png"): "without a .txt beside it",
    }
    assert data.note.startswith(f"{folder}: {len(train)} training pairs, {len(held)} held out; skipped 2: ")
    assert str(folder / "blank.png") in data.note
    assert {"thing", "number", "17"} < set(data.tokenizer.vocabulary)


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_table_as_open_clip_reads_it(tmp_path, separator):
    folder = in_folder(tmp_path / "a")
    rows = [separator.join(("n", "filepath", "title"))]
    rows += [separator.join((str(i), f"a/{i:04}.png", f"thing number {i}")) for i in range(39)]
    rows += [separator.join(("39", str(folder / "0039.png"), "thing number 39"))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    given = {"separator": ";"} if separator == ";" else {}
    data = opened(tmp_path / "pairs.csv", **given)
    assert everything(data) | everything(data, "held") == numbered(40)
    other = opened(tmp_path / "pairs.csv", image_column="filepath", caption_column="n", **given)
    assert everything(other)["7"] == 7
    with pytest.raises(ValueError, match="wanted one of picture and one of caption, text"):
        opened(tmp_path / "pairs.csv", image_column="picture", **given)


def test_shards_by_every_kind_of_path(tmp_path):
    for k in range(12):
        shard(tmp_path / f"part-{k:03}.tar", pairs(10 * k, 10))
    for path in (tmp_path, tmp_path / "part-{000..011}.tar", tmp_path / "part-*.tar"):
        data = opened(path)
        assert everything(data) | everything(data, "held") == numbered(120)
    assert everything(opened(tmp_path / "part-{003..004}.tar")).items() <= numbered(20, 30).items()
    one = opened(tmp_path / "part-003.tar")
    assert everything(one) | everything(one, "held") == numbered(10, 30)
    assert one.sources[0].train.key(0).startswith(f"{tmp_path / 'part-003.tar'}:00")
    with pytest.raises(
        ValueError, match=r"sources: got .*\{010\.\.013\}\.tar, of which .*part-012\.tar does not exist"
    ):
        opened(tmp_path / "part-{010..013}.tar")


def test_what_a_json_beside_a_picture_says(tmp_path):
    asked = [{"question": "what is it", "answer": "a dog"}, {"question": "odd"}, "odd"]
    members = {
        "a.png": picture(), "a.json": {"caption": "Dogs on a street", "objects": ["dog", "traffic light"]},
        "b.png": picture(), "b.txt": b"a red bus", "b.json": {"words": ["bus"], "questions": asked},
        "c.png": picture(), "c.txt": b"a cat on a mat", "c.json": b"[1, {",
        "d.png": picture(), "d.txt": b"a photo of wheels", "d.json": {"objects": "none", "questions": 3},
    }  # fmt: skip
    (tmp_path / "objects.txt").write_text("cat\nwheel\nphoto\nstreet\n")
    config = replace(PLAIN, questions=True, object_words=str(tmp_path / "objects.txt"))
    shard(tmp_path / "a.tar", members)
    (tmp_path / "folder").mkdir()
    for name, content in members.items():
        (tmp_path / "folder" / name).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    (tmp_path / "folder" / "a.txt").write_text("Dogs on a street")
    for path in (tmp_path / "a.tar", tmp_path / "folder"):
        whole = opened(path, config).sources[0].train.whole
        samples = [whole.read(i) for i in range(4)]
        assert samples[0].objects == ("dog", "traffic light") and samples[1].questions == (("what is it", "a dog"),)
        data = opened(path, config)
        batch = next(data.batches(samples, 4))
        flagged = [
            [word for word, kind in zip(sample.caption.split(), kinds[1:].tolist(), strict=False) if kind & OBJECT]
            for sample, kinds in zip(samples, batch["text"]["kind"], strict=True)
        ]
        # a detector's words alone where one of them occurs, else the list; never a word like photo
        assert flagged == [["Dogs"], ["bus"], ["cat"], ["wheels"]]
        assert batch["text"]["kind"][0, 4] == CONTENT
        assert batch["question"]["weight"].tolist() == [0, 1, 0, 0]
        length = batch["question"]["prompt_lengths"].tolist()
        assert length == [2, 5, 2, 2]
        assert batch["question"]["tokens"][0, :4].tolist() == [2, 3, 3, 0]


def test_bad_pictures_are_replaced_counted_and_named(tmp_path, capsys):
    members = pairs(0, 60)
    bad = ("0004", "0011", "0027", "0033", "0041", "0045", "0053")
    for key in bad[:-1]:
        members[f"{key}.png"] = b"no picture"
    members[f"{bad[-1]}.png"] = picture(size=(400, 100))
    folder = "x" * 120 + "/"  # longer than a plain header holds
    members = {folder + name: content for name, content in members.items()}
    shard(tmp_path / "a.tar", members)
    data = opened(tmp_path / "a.tar", replace(PLAIN, max_pixels=30_000))
    assert not any(is_held_out(f"thing number {int(key)}") for key in bad)
    n = len(data.sources[0].train)
    loader = Loader(data, 8, stop=3 * (n // 8))
    batches = list(loader)
    for batch in batches:
        assert batch["images"].shape == (8, 16, 16, 3) and len(set(batch["index"].tolist())) == 8
        for caption, image in zip(batch["captions"], batch["images"], strict=True):
            assert caption == f"thing number {int(image[0, 0, 0])}"
    assert sorted(skip.key.rpartition(":")[2] for skip in loader.skipped) == [f"{folder}{key}.png" for key in bad]
    assert {reason: count for (_, reason), count in loader.skips.items()} == {
        "not a readable picture (UnidentifiedImageError)": len(bad) - 1, "too many pixels": 1}  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and all(str(tmp_path / "a.tar") in line for line in printed)
    config = replace(data.config, workers=2)
    for batch, expected in zip(Loader(replace(data, config=config), 8, start=2, stop=7), batches[2:7], strict=True):
        same(batch, expected)
    for rank in (0, 1):
        for share, batch in zip(Loader(data, 8, rank, 2, stop=5), batches[:5], strict=True):
            assert torch.equal(share["index"], batch["index"][4 * rank : 4 * rank + 4])


def test_bad_held_out_pictures_are_named_too(tmp_path):
    members = {name: b"no picture" if name.endswith("png") else text for name, text in pairs(0, 60).items()}
    shard(tmp_path / "a.tar", members)
    data = opened(tmp_path / "a.tar")
    assert data.held(10) == [] and len(data.skipped) == len(data.sources[0].held) > 2
    with pytest.raises(ValueError, match=r"got .*a.tar with nothing readable in 5\d samples \(5\d not a readable"):
        list(Loader(data, 8))


def test_broken_shards(tmp_path):
    shard(tmp_path / "a.tar", pairs(0, 20))
    shard(tmp_path / "b.tar", pairs(20, 20))
    (tmp_path / "c.tar").write_bytes(b"nonsense" * 100)
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 8 * 6 * 512 + 540])  # eight samples of six blocks and a bit of a picture
    data = opened(tmp_path)
    found = everything(data) | everything(data, "held")
    assert found == numbered(28)
    assert [skip.reason for skip in data.skipped if "b.tar" in skip.key] == [
        "the rest is no readable tar file (unexpected end of data)"
    ]
    assert any(skip.key == str(tmp_path / "c.tar") and "no readable tar file" in skip.reason for skip in data.skipped)
    with pytest.raises(ValueError, match=r"got .*c.tar with no usable pair \(.*no readable tar file"):
        opened(tmp_path / "c.tar")


def test_names_and_captions_that_are_no_text(tmp_path, capsys):
    bad, other = os.fsdecode(b"\xff"), os.fsdecode(b"\xfe")
    members = {**pairs(0, 8), f"{bad}.png": b"no picture", f"{bad}.txt": b"caf\xe9 bad", f"{other}.png": picture()}
    members["y.png"], members["y.json"] = picture(), {"caption": "half a smile \ud83d", "objects": ["\ud83d"]}
    data = opened(shard(tmp_path / "a.tar", members))
    whole = data.sources[0].train.whole
    assert [whole.read(i, picture=False).caption for i in (8, 9)] == ["caf\ufffd bad", "half a smile ?"]
    assert whole.read(9).objects == ("?",)
    assert [skip.key for skip in data.skipped] == [f"{tmp_path / 'a.tar'}:/\\udcfe"]
    loader = Loader(data, 4, stop=6)
    assert len(list(loader)) == 6 and loader.skipped[0].key == f"{tmp_path / 'a.tar'}:\\udcff.png"
    assert "udcff" in capsys.readouterr().out


def test_a_shard_that_disappears_is_skipped(tmp_path):
    for name, first in (("a", 0), ("b", 20)):
        shard(tmp_path / f"{name}.tar", pairs(first, 20))
    data = opened(tmp_path)
    (tmp_path / "b.tar").unlink()
    loader = Loader(data, 4, stop=8)
    assert all(int(index) < 20 for batch in loader for index in batch["index"])
    assert {reason for _, reason in loader.skips} == {"not readable (No such file or directory)"}


def test_the_index_is_kept_until_the_shard_changes(tmp_path, cache, monkeypatch):
    path = shard(tmp_path / "a.tar", {**pairs(0, 20), "x.txt": b"no picture"})
    scanned = []
    scan = shards.scan
    monkeypatch.setattr(shards, "scan", lambda path: scanned.append(path) or scan(path))
    first, again = everything(opened(path)), everything(opened(path))
    assert first == again and len(scanned) == 1
    assert [skip.reason for skip in opened(path).skipped] == ["without a picture"]
    shard(path, pairs(20, 20))
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    assert everything(opened(path)).items() <= numbered(20, 20).items() and len(scanned) == 2
    for file in (cache / "shards").glob("*.npz"):
        file.write_bytes(b"broken")
    assert everything(opened(path)).items() <= numbered(20, 20).items() and len(scanned) == 3


def test_another_path_to_evaluate_on(tmp_path):
    shard(tmp_path / "a.tar", pairs(0, 30))
    data = opened(tmp_path / "a.tar", evaluation=str(in_folder(tmp_path / "b", 12)))
    assert everything(data) == numbered(30) and everything(data, "held") == numbered(12)


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for path, message in (
        ("gone", "does not exist; wanted shapes, emoji, a folder"),
        ("empty", "with no usable pair"),
        ("a.tar.gz", "not compressed"),
        ("*.tar", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"sources: got .*{message}"):
            opened(tmp_path / path)
