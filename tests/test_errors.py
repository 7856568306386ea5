"""Every error is one line that names the argument, what it got and what it wanted, before any work."""

import numpy as np
import pytest
import torch

import fastvlm_loss
from fastvlm_loss import clip_loss

X, Y = torch.randn(4, 8), torch.randn(4, 8)

CASES = [
    (TypeError, "image_features: got list .*wanted a floating tensor", lambda: clip_loss([[1.0]], Y, 1.0)),
    (TypeError, "image_features: got a int64 tensor of shape .4, 8.", lambda: clip_loss(X.long(), Y, 1.0)),
    (ValueError, r"image_features: got a float32 tensor of shape \[8\]", lambda: clip_loss(X[0], Y, 1.0)),
    (ValueError, r"text_features: got .*\[4, 7\], wanted D = 8", lambda: clip_loss(X, Y[:, :7], 1.0)),
    (TypeError, "text_features: got a bfloat16 .* wanted torch.float32", lambda: clip_loss(X, Y.bfloat16(), 1.0)),
    (ValueError, "text_features: got a tensor on meta, wanted cpu", lambda: clip_loss(X, Y.to("meta"), 1.0)),
    (ValueError, r"image_features: got .*\[4, 0\]", lambda: clip_loss(X[:, :0], Y[:, :0], 1.0)),
    (ValueError, "logit_scale: got 0.0, wanted a finite number > 0", lambda: clip_loss(X, Y, 0.0)),
    (ValueError, "logit_scale: got -1.0", lambda: clip_loss(X, Y, -1.0)),
    (ValueError, "logit_scale: got nan", lambda: clip_loss(X, Y, float("nan"))),
    (TypeError, "logit_scale: got str", lambda: clip_loss(X, Y, "10")),
    (TypeError, "logit_scale: got bool", lambda: clip_loss(X, Y, True)),
    (ValueError, r"logit_scale: got .*\[2\], wanted .* shape \[\] or \[1\]", lambda: clip_loss(X, Y, torch.ones(2))),
    (ValueError, "logit_scale: got a int64", lambda: clip_loss(X, Y, torch.tensor(3))),
    (ValueError, "logit_bias: got inf", lambda: clip_loss(X, Y, 1.0, float("inf"))),
    (ValueError, "labels: got None for 4 image and 3 text features", lambda: clip_loss(X, Y[:3], 1.0)),
    (ValueError, r"labels: got 4 at index 2, wanted .* \[0, 4\)", lambda: clip_loss(X, Y, 1.0, labels=torch.tensor([0, 1, 4, 2]))),
    (ValueError, "labels: got -2 at index 0", lambda: clip_loss(X, Y, 1.0, labels=torch.tensor([-2, 1, 0, 2]))),
    (ValueError, r"labels: got .*\[3\], wanted shape \[4\]", lambda: clip_loss(X, Y, 1.0, labels=torch.arange(3))),
    (TypeError, "labels: got a float32", lambda: clip_loss(X, Y, 1.0, labels=torch.zeros(4))),
    (TypeError, "image_ids: got a float32", lambda: clip_loss(X, Y, 1.0, image_ids=torch.zeros(4))),
    (ValueError, r"text_ids: got .*\[5\], wanted shape \[4\]", lambda: clip_loss(X, Y, 1.0, text_ids=torch.arange(5))),
    (ValueError, "text_ids: got None beside labels", lambda: clip_loss(X, Y[:3], 1.0, labels=torch.zeros(4).long(), image_ids=torch.arange(4))),
    (TypeError, "normalize: got str 'no', wanted True or False", lambda: clip_loss(X, Y, 1.0, normalize="no")),
    (ValueError, "logit_scale: got 1e.39, wanted a finite number > 0 and .* <= 3.4", lambda: clip_loss(X, Y, 1e39)),
    (ValueError, "logit_scale: got 1000", lambda: clip_loss(X, Y, 10**400)),
    (ValueError, r"logit_scale: got .*\[1, 1\]", lambda: clip_loss(X, Y, torch.ones(1, 1))),
    (TypeError, "image_features: got a torch.sparse_coo tensor", lambda: clip_loss(X.to_sparse(), Y, 1.0)),
    (TypeError, "image_features: got a float8_e5m2 .* wanted float64", lambda: clip_loss(X.to(torch.float8_e5m2), Y, 1.0)),
    (TypeError, "text_ids: got a uint64", lambda: clip_loss(X, Y, 1.0, text_ids=torch.ones(4, dtype=torch.uint64))),
    (ValueError, "logit_bias: got NaN", lambda: clip_loss(X, Y, 1.0, torch.tensor(torch.nan), check_finite=True)),
    (ValueError, "text_weights: got NaN .* row 1", lambda: clip_loss(X, Y, 1.0, text_weights=torch.tensor([1, torch.nan, 1, 1]), check_finite=True)),
    (ValueError, r"image_weights: got .*\[3\], wanted shape \[4\]", lambda: clip_loss(X, Y, 1.0, image_weights=torch.ones(3))),
    (TypeError, "text_weights: got a int64", lambda: clip_loss(X, Y, 1.0, text_weights=torch.ones(4).long())),
    (ValueError, r"label_smoothing: got 1.0, wanted a finite number >= 0 and < 1", lambda: clip_loss(X, Y, 1.0, label_smoothing=1.0)),
    (ValueError, "directions: got 'texts', wanted one of 'both', 'image', 'text'", lambda: clip_loss(X, Y, 1.0, directions="texts")),
    (ValueError, "reduction: got 'avg', wanted one of", lambda: clip_loss(X, Y, 1.0, reduction="avg")),
    (ValueError, "reduction: got 'none' for 4 images and 3 texts", lambda: clip_loss(X, Y[:3], 1.0, labels=torch.zeros(4).long(), reduction="none")),
    (TypeError, "group: got object, wanted None, a ProcessGroup", lambda: clip_loss(X, Y, 1.0, group=object())),
    (ValueError, "image_features: got NaN or infinity in row 2", lambda: clip_loss(X.index_fill(0, torch.tensor(2), torch.nan), Y, 1.0, check_finite=True)),
    (ValueError, "text_features: got NaN or infinity in row 3", lambda: clip_loss(X, Y.index_fill(0, torch.tensor(3), torch.inf), 1.0, check_finite=True)),
    (ValueError, "backend: got 'cuda', wanted one of 'auto', 'torch', 'cpp', 'triton', 'dense'", lambda: fastvlm_loss.backend("cuda").__enter__()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), CASES, ids=[c[1][:40] for c in CASES])
def test_the_message_names_the_argument(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    assert clip_loss(X, Y, np.float32(2)) == clip_loss(X, Y, np.float64(2)) == clip_loss(X, Y, 2)


def test_check_finite_accepts_finite():
    assert clip_loss(X, Y, 1.0, check_finite=True).isfinite()


def test_a_forced_backend_that_cannot_serve_says_what_it_wants():
    from fastvlm_loss.backends import cpp

    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    with fastvlm_loss.backend("cpp"), pytest.raises(ValueError, match="wanted float32 or bfloat16 features on cpu"):
        clip_loss(X.double(), Y.double(), 1.0)
