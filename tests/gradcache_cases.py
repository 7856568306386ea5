"""Two small towers, their gradients by one backward, and what the cached step is compared with."""

import torch
import torch.nn.functional as F
from torch import nn

from fastvlm_loss import clip_loss, siglip_loss

ULPS = 8


class Tower(nn.Module):
    """An encoder with dropout; counts its forwards, and keeps what it was called in."""

    def __init__(self, width=6, dropout=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), norm(16), nn.Linear(16, 8))
        self.calls = []

    def forward(self, x):
        features = self.body(x)
        self.calls.append((len(x), features.dtype))
        return F.normalize(features, dim=1)


class Model(nn.Module):
    """Two towers with a common layer, and a loss with its own parameters; `forward` is any of the three."""

    def __init__(self, loss="clip", **options):
        super().__init__()
        self.image, self.text, self.common = Tower(6, **options), Tower(5, **options), nn.Linear(8, 8)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))
        self.form = loss

    def encode_image(self, x):
        return F.normalize(self.common(self.image(x)), dim=1)

    def encode_text(self, x):
        return F.normalize(self.common(self.text(x)), dim=1)

    def loss(self, image, text):
        function = {"clip": clip_loss, "siglip": siglip_loss}[self.form]
        return function(image, text, self.logit_scale.exp(), self.logit_bias)

    def forward(self, image=None, text=None, features=None):
        if features is not None:
            return self.loss(*features)
        return self.encode_text(text) if image is None else self.encode_image(image)


def make(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Model(**options).to(dtype)


def batch(rows=11, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype) for width in (6, 5)]


def gradients(model):
    """Gradient of every parameter that has one, taken off."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_one_backward(model, images, texts, micro_batch=None):
    """What is wanted: every micro-batch's graph is kept until one backward of the loss of all."""
    size = micro_batch or len(images)
    image = torch.cat([model.encode_image(x) for x in images.split(size)])
    text = torch.cat([model.encode_text(x) for x in texts.split(size)])
    value = model.loss(image, text)
    value.backward()
    return value.detach(), gradients(model)


def assert_near(got, want, exact=None):
    """Within twice the error of `want` against `exact` and a few units in the last place of the largest gradient."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max().item()
        if exact is not None:
            error = (got[name].double() - exact[name]).abs().max().item()
        allowed = ULPS * torch.finfo(value.dtype).eps * max(value.abs().max().item(), 1e-3)
        if exact is not None:
            allowed += 2 * (value.double() - exact[name]).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
