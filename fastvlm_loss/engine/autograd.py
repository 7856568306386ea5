"""THE autograd Function: statistics of a score matrix as differentiable outputs.

PyTorch's autograd supplies the cotangents of the O(M + N) vectors; the gradient tile G turns them into gradients of
features, scale and bias. A loss therefore needs no formula for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scores.statistics import Softmax, decode
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
        """Run the statistics op and finish its state."""
        # a batch whose products are one small tile keeps it for backward: 6 N^2 D operations instead of 8
        keep = any(ctx.needs_input_grad[:3]) and x.shape[0] * y.shape[0] <= KEPT_PRODUCTS
        state, products = ops.STATISTICS[backend](x, y, scale, bias, target, row_id, col_id, epilogue, flags, keep)
        ctx.save_for_backward(x, y, scale, bias, target, row_id, col_id, targets, state, products)
        ctx.value = backend, epilogue, flags
        return decode(epilogue, flags).finish(state, targets)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, scale and bias; what needs none costs none."""
        with torch.no_grad():
            found = Statistics._gradients(ctx, *cotangents)
        if torch.is_grad_enabled():  # create_graph=True: a second derivative must fail, not be silently 0
            anchor = next(t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if needed)
            found = [None if g is None else _Once.apply(g, anchor) for g in found]
        return (*found, *(None,) * 7)

    @staticmethod
    def _gradients(ctx: Any, *cotangents: Tensor) -> list[Tensor | None]:
        x, y, scale, bias, target, row_id, col_id, targets, state, products = ctx.saved_tensors
        need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
        backend, epilogue, flags = ctx.value
        statistic: Softmax = decode(epilogue, flags)
        need_sums = need_scale or (need_bias and not statistic.shift_invariant)
        d_scale = d_bias = None
        d_x = d_y = None
        if need_x or need_y or need_sums:
            operands = statistic.gradient_operands(state, targets, cotangents)
            unit = None
            if x.dtype == torch.float16 and operands.shape[1]:
                # fp16 holds G in units of the largest cotangent, |G| <= 1 per direction: it neither underflows with
                # the batch size nor overflows with a loss scaler (fp32 and bf16 have the exponents for both)
                unit = cotangents[0].abs().amax()
                unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
                operands[1:] /= unit
            d_x, d_y, sums = ops.GRADIENT[backend](
                x, y, scale, bias, target, row_id, col_id, products, operands, unit, epilogue, flags,
                need_x, need_y, need_sums,
            )  # fmt: skip
            d_scale = sums[0] if need_scale else None
            d_bias = sums[1] if need_bias and not statistic.shift_invariant else None
        if need_bias and statistic.shift_invariant:
            d_bias = torch.zeros_like(scale)
        return [d_x if need_x else None, d_y if need_y else None, d_scale, d_bias]


class _Once(torch.autograd.Function):
    """Identity of a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("fastvlm_loss: no second derivatives; compute this loss under fastvlm_loss.backend('dense')")
