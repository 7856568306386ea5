"""THE autograd Function: statistics of a score matrix as differentiable outputs.

PyTorch's autograd supplies the cotangents of the O(M + N) vectors; the gradient tile G turns them into gradients of
features, scale and bias. A loss therefore needs no formula for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scores.statistics import decode
from . import ops

__all__ = ["Statistics"]

KEPT_PRODUCTS = 1024 * 1024  # 4 MB in fp32


class Statistics(torch.autograd.Function):
    """`(x, y, scale, bias, target, row_id, col_id, targets [L], backend, epilogue, flags) -> vectors [L]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, target: Tensor | None,
        row_id: Tensor | None, col_id: Tensor | None, targets: Tensor | None, backend: str, epilogue: str, flags: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Run the statistics op; its state and small products are for backward."""
        problem = x, y, scale, bias, target, row_id, col_id, targets
        # a batch whose products are one small tile keeps it for backward: 6 N^2 D operations instead of 8
        keep = any(ctx.needs_input_grad[:3]) and x.shape[0] * y.shape[0] <= KEPT_PRODUCTS
        nll, gap, state, products = ops.STATISTICS[backend](*problem, epilogue, flags, keep)
        ctx.save_for_backward(*problem, state, products)
        ctx.statistic = backend, epilogue, flags
        return (nll, gap) if decode(epilogue, flags).gap else (nll,)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor, d_gap: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, scale and bias; what needs none costs none."""
        saved = ctx.saved_tensors  # once: checkpointing unpacks on access
        problem, (state, products) = saved[:8], saved[8:]
        need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
        backend, epilogue, flags = ctx.statistic
        shift_invariant = decode(epilogue, flags).shift_invariant
        dx = dy = d_scale = d_bias = None
        if need_x or need_y or need_scale or (need_bias and not shift_invariant):
            d_nll, d_gap = d_nll.contiguous(), None if d_gap is None else d_gap.contiguous()
            dx, dy, d_scale, d_bias = ops.GRADIENT[backend](
                *problem, state, products, d_nll, d_gap, epilogue, flags, need_x, need_y
            )
        if need_bias and shift_invariant:
            d_bias = torch.zeros_like(problem[2])
        given = (dx, need_x), (dy, need_y), (d_scale, need_scale), (d_bias, need_bias)
        found = [gradient if needed else None for gradient, needed in given]
        if torch.is_grad_enabled():  # create_graph=True: a second derivative must fail, not be silently 0
            anchor = next(t for t, needed in zip(problem, ctx.needs_input_grad, strict=False) if needed)
            found = [None if g is None else _Once.apply(g.detach(), anchor) for g in found]
        return (*found, *(None,) * 7)


class _Once(torch.autograd.Function):
    """Identity of a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        """The gradient, tied to what it depends on."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse."""
        raise RuntimeError("fastvlm_loss: no second derivatives; compute this loss under fastvlm_loss.backend('dense')")
