"""docs/losses.md, the README's table and the pictures are what the generators write; the examples on the page run."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fastvlm_loss
from docs import docstrings, gradients, make, page, ranks
from fastvlm_loss.losses import parameters

ROOT = Path(__file__).parents[1]
PAGE = make.PAGE.read_text()
NEGATIVES = (make.PAGE.parent / "negatives.md").read_text()


def test_the_page_and_the_readme_are_up_to_date():
    names = ", ".join(str(path.relative_to(ROOT)) for path in make.stale())
    assert not names, f"{names}: differs from the docstrings or the registry, run {make.COMMAND}"


def test_the_command_says_so():
    run = subprocess.run(
        [sys.executable, "-m", "docs.make", "--check"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="README: got no markers"):
        make.splice("nothing", "")


@pytest.mark.parametrize("spec", page.specs(), ids=lambda s: s.name)
def test_every_loss_has_the_same_headings(spec):
    section = re.search(rf"^## {spec.name}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]
    assert tuple(re.findall(r"^### (.*)$", section, re.M)) == page.HEADINGS
    assert "fastvlm_loss." in section.partition("### Module")[2], "wanted a module of its own"


@pytest.mark.parametrize("spec", page.specs(), ids=lambda s: s.name)
def test_every_argument_is_described(spec):
    doc = docstrings.of(spec.function).sections["Args"]
    missing = [name for name in parameters(spec.function) if not re.search(rf"\b{name}\b", doc)]
    assert not missing
    assert set(docstrings.described(doc)) <= {*parameters(spec.function), "options"}


def test_the_examples_run_in_order():
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "losses.md", "exec"), scope)
    assert scope["to_text"].isfinite() and scope["metrics"].image_accuracy is not None


def test_the_pictures_can_be_drawn_again(tmp_path):
    drawn = gradients.draw(tmp_path)
    assert [path.name for path in drawn] == [f"gradients-{name}.svg" for name in gradients.PICTURES]
    for path in drawn:
        kept = make.PAGE.parent / path.name
        assert f"]({path.name})" in PAGE
        assert 2_000 < kept.stat().st_size < 60_000
        for file in (path, kept):
            ElementTree.fromstring(file.read_text())
    again = [path.read_bytes() for path in drawn]
    assert again == [path.read_bytes() for path in gradients.draw(tmp_path)]


def test_the_pictures_show_gradients():
    """With one image, what is drawn is the derivative of the loss with respect to a negative's score."""
    from fastvlm_loss import clip_loss, siglip_loss, triplet_loss

    cosines = torch.tensor([-0.2, 0.1, 0.35, 0.5], dtype=torch.float64)
    scores = gradients.SCALE * torch.cat([cosines.new_tensor([gradients.POSITIVE]), cosines])
    softmax = gradients.pull(clip_loss, cosines, directions="image")
    torch.testing.assert_close(softmax, scores.softmax(0)[1:])
    sigmoid = gradients.pull(siglip_loss, cosines, logit_bias=-5.0)
    torch.testing.assert_close(sigmoid, (scores[1:] - 5).sigmoid())
    ranking = gradients.pull(triplet_loss, cosines, scale=None, mining="max", directions="image")
    assert ranking.tolist() == [0, 0, 0, 1]


def test_the_examples_about_negatives_run_in_order():
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", NEGATIVES, re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "negatives.md", "exec"), scope)
    assert len(scope["pairs"].labels) == 512 and scope["index"].shape == (256, 4)


def test_every_published_method_is_a_call_that_runs():
    features = ("image", "text", "image_m", "text_m", "image_g", "text_g")
    scope = {name: torch.nn.functional.normalize(torch.randn(30, 8), dim=1) for name in features}
    scope |= {name: getattr(fastvlm_loss, name) for name in fastvlm_loss.__all__} | {"math": math}
    scope |= {"scale": 20.0, "step": 3, "ids": torch.arange(30) // 2, "texts": fastvlm_loss.FeatureQueue(9, 8)}
    section = re.search(r"^## Which published method(.*?)(?=^## )", NEGATIVES, re.S | re.M)[1]
    calls = [call for call in re.findall(r"`((?:\w+)\(.*?\))`(?= |\W)", section) if "..." not in call]
    assert len(calls) >= 12
    for call in calls:
        assert eval(call, scope) is not None, call


def test_the_picture_of_ranks_shows_what_is_picked(tmp_path):
    path = tmp_path / "ranks.svg"
    drawn = ranks.draw(path).read_bytes()
    for svg in (drawn, ranks.PICTURE.read_bytes()):
        ElementTree.fromstring(svg)
        assert 2_000 < len(svg) < 60_000
    assert f"]({ranks.PICTURE.name})" in NEGATIVES and drawn == ranks.draw(path).read_bytes()
    features = ranks.batch()
    of = ranks.places(features)
    found = [ranks.shares(ranks.ranks(features, of, hardness=h)) for h in ranks.HARDNESS]
    assert all(bool((harder >= easier).all()) for easier, harder in pairwise(found))
    uniform = torch.arange(1, ranks.PAIRS) / (ranks.PAIRS - 1)
    torch.testing.assert_close(found[0], uniform, atol=1.63 / (2 * ranks.STEPS * ranks.PAIRS) ** 0.5, rtol=0)
    assert bool((found[-1] == 1).all())
    # "12 % of the picks are the very hardest at scale 1/0.07, and 84 % at scale 100"
    late = ranks.shares(ranks.ranks(features, of, scale=100.0))
    assert [round(100 * float(share[0])) for share in (found[2], late)] == [12, 84]
