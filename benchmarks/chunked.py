"""CLIP's loss in well-written plain PyTorch: row chunks, streaming log-sum-exp, recompute in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunked_clip_loss"]

ROWS = 512


def chunked_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over chunks of image rows; products in the features' dtype, everything else fp32."""
    loss: Tensor = _Chunked.apply(image_features, text_features, logit_scale)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        n = len(x)
        row_lse, target = torch.empty(2, n, device=x.device)
        col_lse = torch.full((n,), -torch.inf, device=x.device)
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            s = (x[rows] @ y.T).float().mul_(scale)
            row_lse[rows] = s.logsumexp(1)
            torch.logaddexp(col_lse, s.logsumexp(0), out=col_lse)
            target[rows] = s.diagonal(start)
        ctx.save_for_backward(x, y, scale, row_lse, col_lse)
        loss: Tensor = (row_lse + col_lse).div_(2).sub_(target).mean()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, scale, row_lse, col_lse = ctx.saved_tensors
        n = len(x)
        dx, dy = torch.empty_like(x, dtype=torch.float32), torch.zeros_like(y, dtype=torch.float32)
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            s = (x[rows] @ y.T).float().mul_(scale)
            g = (s - row_lse[rows, None]).exp_().add_(s.sub_(col_lse).exp_())
            g.diagonal(start).sub_(2)
            g = g.to(x.dtype)
            dx[rows] = g @ y
            dy += g.T @ x[rows]
        d_scale = torch.linalg.vecdot(dx, x.float()).sum()  # sum_ij G_ij <x_i, y_j>
        unit = grad / (2 * n)
        return dx.mul_(unit * scale).to(x.dtype), dy.mul_(unit * scale).to(y.dtype), unit * d_scale
