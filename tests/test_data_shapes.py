"""The embedded shapes: deterministic, and everything said about a picture is true of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvlm_loss.data import shapes
from fastvlm_loss.data.shapes_draw import RGB, coverage, draw
from fastvlm_loss.data.shapes_scene import OPPOSITE, RELATIONS, SHAPES, Scene, Thing

SAMPLES = [(level, index) for level in (1, 2, 3, None) for index in range(40)]


def test_same_numbers_same_sample_and_different_ones_differ():
    for level in (1, 2, 3, None):
        first, again = (shapes.sample(5, 17, level, 48) for _ in range(2))
        assert first.caption == again.caption and first.boxes == again.boxes
        assert np.array_equal(first.image, again.image)
    assert len({shapes.sample(5, i, size=16).image.tobytes() for i in range(50)}) == 50
    assert shapes.sample(1, 3, 3).caption != shapes.sample(2, 3, 3).caption


def test_known_sample_stays_the_same_between_versions():
    assert [shapes.scene(0, i, 3).caption for i in range(2)] == [
        "a small red circle above a large pink star on a black background",
        "a large purple heart left of a small orange ring on a black background",
    ]


def test_sample_has_the_promised_types_and_a_scene_independent_of_size():
    for size in (16, 48, 64, 97):
        sample = shapes.sample(0, 4, size=size)
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert sample.scene == shapes.scene(0, 4)


@pytest.mark.parametrize("level, things", [(1, 1), (2, 2), (3, 2)])
def test_levels(level, things):
    scenes = [shapes.scene(1, i, level) for i in range(60)]
    assert {len(scene.things) for scene in scenes} == {things}
    assert {scene.relation is None for scene in scenes} == {level != 3}


def test_mixture_has_all_levels_and_all_words():
    scenes = [shapes.scene(2, i) for i in range(600)]
    assert {(len(s.things), s.relation is not None) for s in scenes} == {(1, False), (2, False), (2, True)}
    said = {word for scene in scenes for word in scene.caption.split()}
    assert set(SHAPES) | set(RGB) | {"small", "large", "white", "gray", "black", "striped", "left", "above"} <= said


@pytest.mark.parametrize("level, index", SAMPLES)
def test_boxes_hold_exactly_the_pixels_that_an_object_changes(level, index):
    """Repaint an object in another colour: every pixel that changes is in its box, and the box is tight around them."""
    scene, dice = shapes._scene(9, index, level)
    things = shapes._place(scene, dice, 64)
    picture, boxes = draw(64, scene.background, things)
    for i, (shape, rgb, *place) in enumerate(things):
        other = [*things]
        other[i] = (shape, tuple((value + 128) % 256 for value in rgb), *place)
        changed = np.argwhere((draw(64, scene.background, other)[0] != picture).any(-1))
        (y0, x0), (y1, x1) = changed.min(0), changed.max(0) + 1
        left, top, right, bottom = boxes[i]
        assert left <= x0 and top <= y0 and x1 <= right and y1 <= bottom
        assert x0 - left <= 1 and y0 - top <= 1 and right - x1 <= 1 and bottom - y1 <= 1
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64


def test_hidden_part_does_not_count_for_the_box_and_a_clipped_one_ends_at_the_border():
    below, above = ("square", (255.0, 0.0, 0.0), 30, 30, 10), ("square", (0.0, 0.0, 255.0), 42, 30, 18)
    _, (box, top_box) = draw(64, "white", [below, above])
    _, (alone,) = draw(64, "white", [below])
    assert alone[2] > box[2] and box[:2] == alone[:2] and top_box[2] <= 64
    _, (cut,) = draw(64, "white", [("circle", (0.0, 0.0, 0.0), 2, 60, 12)])
    assert cut[0] == 0 and cut[3] == 64
    _, (nothing, _) = draw(
        64, "white", [("circle", (0.0, 0.0, 0.0), 30, 30, 6), ("square", (9.0, 9.0, 9.0), 30, 30, 25)]
    )
    assert nothing[0] == nothing[2]


def test_edges_are_anti_aliased():
    for shape in SHAPES:
        levels = np.unique(coverage(shape, 12))
        assert levels.min() == 0 and levels.max() == 1 and ((levels > 0) & (levels < 1)).any(), shape


def test_relation_holds_in_the_picture():
    for index in range(200):
        sample = shapes.sample(3, index, 3)
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = sample.boxes
        right, down = (bx0 + bx1) - (ax0 + ax1), (by0 + by1) - (ay0 + ay1)
        is_so = {"left of": right > 0, "right of": right < 0, "above": down > 0, "below": down < 0}
        assert is_so[sample.scene.relation], sample.caption
        across = abs(right) > abs(down)
        assert across == (sample.scene.relation in ("left of", "right of"))


def test_spans_are_the_words_they_say():
    for level in (1, 2, 3):
        for index in range(50):
            scene = shapes.scene(4, index, level)
            for start, end, kind, thing in scene.spans:
                word = scene.caption[start:end]
                if kind == "object":
                    assert word == scene.things[thing].shape
                elif kind == "relation":
                    assert word == scene.relation
                else:
                    assert word == scene.background if thing is None else word in scene.things[thing][:2]
            starts = [span.start for span in scene.spans]
            assert starts == sorted(starts) and len(scene.spans) == 3 * len(scene.things) + 1 + (level == 3)


def test_questions_are_answered_by_the_scene():
    kinds = set()
    for index in range(150):
        scene = shapes.scene(6, index)
        texts = [question for question, _, _ in scene.questions]
        assert len(texts) == len(set(texts)), "two answers to one question"
        for question, answer, kind in scene.questions:
            kinds.add(kind)
            words = question.split()
            if kind == "colour":
                assert [t.colour for t in scene.things if t.shape == words[-1]] == [answer]
            elif kind == "size":
                assert [t.size for t in scene.things if [t.colour, t.shape] == words[-2:]] == [answer]
            elif kind == "exists":
                assert any([t.colour, t.shape] == words[-2:] for t in scene.things) == (answer == "yes")
            elif kind == "count":
                assert int(answer) == len(scene.things)
            else:
                relation = next(r for r in RELATIONS if r in question)
                first = relation == scene.relation
                assert answer == scene.things[0 if first else 1].shape
                assert question.endswith(str(scene.things[1 if first else 0]))
    assert kinds == {"colour", "size", "exists", "count", "shape"}


def test_distractors_are_false_and_use_the_same_kind_of_words():
    captions = set()
    for index in range(150):
        scene = shapes.scene(7, index)
        assert scene.distractors and scene.caption not in scene.distractors
        captions.update(scene.distractors)
    scene = Scene((Thing("small", "red", "star"), Thing("small", "blue", "ring")), "above", "white")
    assert "a small blue star above a small red ring on a white background" in scene.distractors
    assert f"a small red star {OPPOSITE['above']} a small blue ring on a white background" in scene.distractors
    twins = Scene((Thing("small", "red", "star"), Thing("small", "red", "star")), "above", "white")
    assert all("below" not in caption for caption in twins.distractors), "turning the relation of twins is still true"
    pair = Scene((Thing("small", "red", "star"), Thing("small", "blue", "star")), None, "white")
    assert "and a small red star" in pair.caption
    assert pair.caption not in pair.distractors, "swapping the colours of such a pair changes nothing"


def test_splits_share_no_caption_and_test_captions_are_all_different():
    splits = shapes.load(train=3000, test=300, size=16)
    train, test = set(splits.train.captions), set(splits.test.captions)
    assert len(splits.train) == 3000 and len(test) == len(splits.test) == 300
    assert not train & test
    assert len(train) < 3000, "one-object captions repeat, which is why the loss takes ids"
    picture = splits.train.images[torch.tensor([5, 0])]
    assert picture.shape == (2, 16, 16, 3) and picture.dtype == torch.uint8


def test_bad_arguments_are_named():
    for message, call in (
        ("level: got 4", lambda: shapes.sample(0, 0, level=4)),
        ("size: got 8", lambda: shapes.sample(0, 0, size=8)),
        ("seed, index: got -1", lambda: shapes.sample(-1, 0)),
        ("test: got 80, wanted at most", lambda: shapes.load(train=1, test=80, level=1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_import_needs_no_picture_library():
    code = (
        "import sys, fastvlm_loss.data.shapes as s; s.sample(0, 0); "
        "print(*sorted({'PIL', 'torchvision', 'open_clip', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
