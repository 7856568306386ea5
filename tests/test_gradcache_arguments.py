"""What the cached step takes: nested batches and features, modules found in the encoders; and its errors."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gradcache_cases import Model, Tower, assert_near, batch, by_one_backward, gradients, make
from torch import Tensor, nn

from fastvlm_loss import cached_step, clip_loss
from fastvlm_loss.gradcache import _found

PAGE = Path(__file__).parents[1] / "docs" / "gradcache.md"


class Features(NamedTuple):
    pooled: Tensor
    tokens: Tensor | None


def test_nested_batches_and_features_keep_their_form():
    model, (images, texts) = make(), batch()
    want = by_one_backward(model, images, texts)[1]
    seen = []

    def encode_image(x):
        assert type(x) is dict and x["mask"] is None and isinstance(x["pixels"], tuple)
        image, twice = x["pixels"]
        seen.append((len(image), len(twice[0])))
        return {"features": model.encode_image(image), "rows": torch.arange(len(image))}

    def encode_text(x):
        return Features(model.encode_text(x.pooled), x.tokens)

    def loss(x, y):
        assert isinstance(y, Features) and y.tokens is None and not x["rows"].is_floating_point()
        assert x["rows"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
        return model.loss(x["features"], y.pooled)

    pixels = {"pixels": (images, [images]), "mask": None}
    cached_step(encode_image, encode_text, pixels, Features(texts, None), loss, micro_batch=4, check_replay=True)
    assert seen == 2 * [(4, 4), (4, 4), (3, 3)]
    assert_near(gradients(model), want)


def test_sides_of_different_sizes():
    model, (images, texts) = make(), batch()
    labels = torch.arange(5)
    loss = lambda x, y: clip_loss(x, y, 10.0, labels=labels)  # noqa: E731
    loss(model.encode_image(images[:5]), model.encode_text(texts)).backward()
    want = gradients(model)
    cached_step(model.encode_image, model.encode_text, images[:5], texts, loss, micro_batch=4)
    assert_near(gradients(model), want)


def test_only_what_the_loss_uses_of_several_features_is_followed():
    model, (images, texts) = make(), batch()
    want = by_one_backward(model, images, texts)[1]
    both = lambda x: (model.encode_text(x), model.encode_text(x).detach(), model.encode_text(x))  # noqa: E731
    cached_step(model.encode_image, both, images, texts, lambda x, y: model.loss(x, y[0]), micro_batch=4)
    assert_near(gradients(model), want)


def encode_by_name(x):
    return MODEL.encode_image(x)


MODEL = Model()


def test_modules_are_found_in_the_encoders():
    model, tower = make(), Tower()
    inside = set(model.modules())
    assert set(_found(None, (model, tower))) == inside | set(tower.modules())
    assert set(_found(None, (model.encode_image, len))) == inside
    assert set(_found(None, (partial(Model.encode_image, model), partial(len)))) == inside
    assert set(_found(None, (lambda x: model(image=x), lambda x: model(text=x)))) == inside
    assert set(_found(None, (encode_by_name, len))) == set(MODEL.modules())
    assert _found((), (model, tower)) == [] and set(_found([tower], (model, model))) == set(tower.modules())


IMAGES, TEXTS = batch()
CASES = [
    (TypeError, "micro_batch: got float 2.0, wanted an int", {"micro_batch": 2.0}),
    (ValueError, "micro_batch: got 0, wanted at least 1", {"micro_batch": 0}),
    (TypeError, "check_replay: got int 1, wanted True or False", {"check_replay": 1}),
    (TypeError, r"modules\[1\]: got int, wanted a torch.nn.Module", {"modules": [nn.Linear(1, 1), 3]}),
    (TypeError, r"images: got list without a tensor, wanted a tensor or a tuple, list or", {"images": []}),
    (TypeError, r"texts\['a'\]\[1\]: got str, wanted a tensor or a tuple", {"texts": {"a": (TEXTS, "b")}}),
    (ValueError, r"texts: got a tensor of shape \[\], wanted the batch in dimension 0", {"texts": torch.zeros(())}),
    (ValueError, r"images\[1\]: got 7 rows, wanted 11 as in images\[0\]", {"images": (IMAGES, IMAGES[:7])}),
    (TypeError, "encode_text: got int, wanted a tensor", {"encode_text": lambda x: 3}),
    (
        ValueError,
        r"encode_text: got features of shape \[3, 8\] for 4 rows",
        {"encode_text": lambda x: x.new_ones(3, 8)},
    ),
    (ValueError, r"encode_text\[0\]: got a tensor of shape \[\], wanted", {"encode_text": lambda x: [x.sum()]}),
    (
        ValueError,
        r"encode_text: got rows of shape \[\[3\]\] after \[\[4\]\], wanted all micro-batches alike",
        {"encode_text": lambda x: x.new_ones(len(x), len(x))},
    ),
    (TypeError, "loss: got a function that returns dict, wanted a scalar", {"loss": lambda x, y: {"loss": x.sum()}}),
    (ValueError, r"loss: got a function that returns shape \[11\]", {"loss": lambda x, y: x[:, 0]}),
    (
        ValueError,
        "loss: got a value that depends on nothing to train",
        {"encode_image": lambda x: x.detach(), "encode_text": lambda x: x, "loss": lambda x, y: x.sum() + y.sum()},
    ),
    (ValueError, "loss: got a value that depends on nothing to train", {"loss": lambda x, y: x.detach().sum()}),
]


@pytest.mark.parametrize(("error", "message", "change"), CASES)
def test_errors_name_the_argument(error, message, change):
    model = make()
    arguments = {
        "encode_image": model.encode_image, "encode_text": model.encode_text, "images": IMAGES, "texts": TEXTS,
        "loss": model.loss, "micro_batch": 4,
    }  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        cached_step(**arguments | change)
    assert not gradients(model)
    if message.startswith("loss"):
        with pytest.raises(error, match=f"^{message}"):
            cached_step(**arguments | change | {"micro_batch": None})


def test_the_examples_of_the_page_run_in_order():
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["value"].isfinite()
