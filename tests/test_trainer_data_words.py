"""Kinds of words and their concreteness, from a sample's own words and from a user's files."""

import pytest

from fastvlm_loss.trainer.data import ATTRIBUTE, CONTENT, OBJECT, STOP, Sample, WordKinds
from fastvlm_loss.trainer.data.words import forms


def test_by_what_the_sample_names():
    kinds = WordKinds()
    sample = Sample(0, "", objects=("traffic light", "Bus"), attributes=("red",))
    words = ["the", "red", "buses", "at", "a", "light", "waiting", ",", "photo"]
    flags = [STOP, CONTENT | ATTRIBUTE, CONTENT | OBJECT, STOP, STOP, CONTENT | OBJECT, CONTENT, STOP, CONTENT]
    assert kinds(words, sample) == list(zip(flags, [1.0, 4.0, 5.0, 1.0, 1.0, 5.0, 2.0, 1.0, 2.0], strict=True))
    assert [flag for flag, _ in kinds(words, Sample(0, ""))] == [flag & (CONTENT | STOP) for flag in flags]


def test_what_can_be_no_object(tmp_path):
    (tmp_path / "objects.txt").write_text("Dog\nphoto\nx\nthe\n\nchild\n")
    kinds = WordKinds(str(tmp_path / "objects.txt"))
    words = ["the", "photo", "x", "dogs", "child"]
    objects = [word for word, (flag, _) in zip(words, kinds(words, Sample(0, "")), strict=True) if flag & OBJECT]
    assert objects == ["dogs", "child"]
    labelled = kinds(words, Sample(0, "", objects=("child",)))
    assert [word for word, (flag, _) in zip(words, labelled, strict=True) if flag & OBJECT] == ["child"]


@pytest.mark.parametrize(
    "text",
    [
        "dog\t4.85\nidea\t1.6\n",
        "Word\tBigram\tConc.M\tConc.SD\ndog\t0\t4.85\t0.1\nidea\t0\t1.6\t0.2\n",
        "Word,rating\ndog,4.85\nidea,1.6",
    ],
)
def test_concreteness_from_a_table(tmp_path, text):
    (tmp_path / "ratings").write_text(text)
    kinds = WordKinds(concreteness=str(tmp_path / "ratings"))
    assert [rating for _, rating in kinds(["dog", "dogs", "idea", "blue"], Sample(0, ""))] == [4.85, 4.85, 1.6, 2.0]


def test_singulars():
    for plural in ("dogs", "buses", "boxes", "cities", "cookies", "watches", "horses", "houses", "glasses", "Ties"):
        singular = {"buses": "bus", "boxes": "box", "cities": "city", "watches": "watch", "glasses": "glass"}
        assert singular.get(plural, plural[:-1].lower()) in forms(plural)
    assert [forms(word) for word in ("glass", "bus", "this", "gas", "cares")] == [
        ("glass",), ("bus",), ("this",), ("gas",), ("cares", "care")
    ]  # fmt: skip


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "a").write_text("dog\t4\ncat\tmuch\n")
    (tmp_path / "b").write_text("word\trating\n")
    for options, message in (
        ({"objects": str(tmp_path / "gone")}, "object_words: got .*gone, which cannot be read"),
        ({"concreteness": str(tmp_path / "a")}, "concreteness: got .* with the line 'cat\\\\tmuch', wanted a word"),
        ({"concreteness": str(tmp_path / "b")}, "concreteness: got .*b without a rating"),
    ):
        with pytest.raises(ValueError, match=message):
            WordKinds(**options)
