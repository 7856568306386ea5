"""Patches, texts and what tests of multi-scale matching share."""

import pytest
import torch
import torch.nn.functional as F

MODES = ["soft", "hard", "mul"]
by_mode = pytest.mark.parametrize("mode", MODES)
IMAGE, TEXT = torch.tensor([0, 3, 3, 1, 4, 3, 0, 2]), torch.tensor([6, 0, 0, 2, 5, 1, 6, 3])


def inputs(b=5, p=4, d=6, n=7, dtype=torch.float64, seed=0):
    """Patches, texts, relevance and a mask; one image has no patch."""
    g = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(*s, d, generator=g, dtype=torch.float64), dim=-1) for s in ((b, p), (n,)))
    r = 0.1 + 0.85 * torch.rand(b, p, generator=g, dtype=torch.float64)
    mask = (torch.rand(b, p, generator=g) < 0.6).index_fill(0, torch.arange(1, min(b, 2)), False)
    mask[0, p - 1] = mask[2:, 0] = True
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), r.to(wide).requires_grad_(), mask


def formula(c, r, mode, mask=None, s=10.0, weight=1.0, floor=0.05):
    """The scores of products and relevance `[n, P]`, as the specification writes them."""
    mask = torch.ones_like(c, dtype=torch.bool) if mask is None else mask
    drop = mask.any(1)
    z = c * r.clamp(0, 1) if mode == "mul" else c
    prior = torch.zeros_like(c) if mode == "mul" else weight * r.clamp(floor, 1).log()
    low = torch.where(mask | ~drop[:, None], 0.0, -torch.inf).to(c)
    if mode == "soft":
        found = ((s * z + prior + low).logsumexp(1) - (prior + low).logsumexp(1)) / s
    else:
        found = (z + prior / s + low).max(1).values
    return torch.where(drop, found, 0.0)


def gradients(loss, tensors):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]


def assert_same(a, b, rtol=1e-10, atol=1e-12):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
