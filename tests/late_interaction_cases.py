"""Token sets and what tests of late interaction share."""

import torch
import torch.nn.functional as F


def sets(m=6, n=None, p=4, t=3, d=8, dtype=torch.float64, seed=0):
    """Unit tokens of pairs that resemble one another, and a scale, that require gradients."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(m if n is None else n, 1, d, generator=g, dtype=torch.float64)
    x = y[torch.arange(m) % len(y)] + torch.randn(m, p, d, generator=g, dtype=torch.float64)
    y = y + torch.randn(len(y), t, d, generator=g, dtype=torch.float64)
    tensors = F.normalize(x, dim=2).to(dtype), F.normalize(y, dim=2).to(dtype), torch.tensor(7.0)
    return [v.to(dtype) if v.dim() else v.to(torch.promote_types(dtype, torch.float32)) for v in tensors]


def leaves(**sizes):
    return [v.requires_grad_() for v in sets(**sizes)]


def gradients(loss, tensors):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]


def assert_same(a, b, rtol=1e-11, atol=1e-12):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


def some(m, tokens, seed):
    """A mask with one to all tokens, not always the first ones."""
    mask = torch.rand(m, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    return mask.index_fill(1, torch.tensor(seed % tokens), True)
