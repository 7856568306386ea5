"""Linear projection to a vocabulary and cross-entropy in one, without the n x V logits.

z_tv = <hidden_t, weight_v> + bias_v
l_t = LSE_v z_tv - (1 - eps) z_t,y - eps mean_v z_tv
with a teacher u_tv = <teacher_hidden_t, teacher_weight_v>:
    l_t = LSE_v z_tv - (1 - a) z_t,y - a sum_v softmax(u)_tv z_tv
L = sum_t w_t l_t / sum_t w_t over the targets that are not ignored
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import eager_in_group, group_of
from ..engine import tile
from ..scores import check
from ._oracle import all_targets, some_bias, some_targets, some_teacher, some_teacher_weight, some_weights
from ._reduce import REDUCTIONS
from ._spec import Learned, LossSpec, register
from ._tokens import TokenBatch

__all__ = ["linear_cross_entropy"]


@eager_in_group
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    alpha: float = 0.4,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalizer: Tensor | float | None = None,
    group: object = None,
) -> Tensor:
    """Cross-entropy of a vocabulary head: masked language modelling, captions, answers.

    Use it wherever a linear layer and a cross-entropy follow one another and the vocabulary or the number of classes is
    large.

    On a CPU ignored tokens cost nothing. On a GPU they cost as much as others, because counting them would wait for it:
    gather the tokens that count first where most do not (masked language modelling).

    Args:
        hidden: `[n, H]` or `[..., n, H]`, fp64, fp32, bf16 or fp16; under autocast cast to its dtype, as a matmul's
            operands are.
        weight: `[V, H]`, same dtype and device.
        targets: int `[...]` as `hidden`, in [0, V) or `ignore_index`.
        bias: `[V]` or None, floating.
        ignore_index: target that does not count.
        label_smoothing: eps in [0, 1), spread evenly over the vocabulary; not beside a teacher.
        token_weights: floating `[...]`, weight of each token in the mean. Meant to be >= 0; not checked.
            Differentiable.
        teacher_hidden, teacher_weight: `[..., E]`, `[V, E]` of a (momentum) teacher whose softmax is a part of the
            target. No gradient. Only together.
        alpha: in [0, 1], that part.
        reduction: "mean" (weighted, over the tokens that count; 0 without any), "sum" or "none" (`[...]`, 0 for ignored
            ones).
        normalizer: of "mean", what the sum is divided by instead: the tokens of all accumulation steps, for instance.
            Number or tensor; a tensor of 0 counts as 1.
        group: None, or a process group (or one dimension of a `DeviceMesh`) whose tokens are one batch: sums, means and
            normalizers are the group's, and DDP's mean of the gradients is that of the whole batch.

    Returns:
        fp32 (fp64 for fp64 features) scalar, or `[...]`. Differentiable in hidden, weight, bias and token weights.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Devlin et al. 2019 (BERT), section 3.1; Wijmans et al. 2024 (Cut Cross-Entropy), section 4; Li et al. 2021
        (ALBEF), equation 7 (teacher).
    """
    eps = check.number("label_smoothing", label_smoothing, low=0.0, below=1.0)
    share = check.number("alpha", alpha, low=0.0, most=1.0)
    check.choice("reduction", reduction, REDUCTIONS)
    check.whole("ignore_index", ignore_index)
    collectives = None if group is None else group_of(group)
    if (teacher_hidden is None) != (teacher_weight is None):
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_weight"
        raise ValueError(f"{missing}: got None, wanted both teacher_hidden and teacher_weight or neither")
    if eps and teacher_hidden is not None:
        raise ValueError("label_smoothing: got a number above 0 beside a teacher, wanted 0")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer: got a value beside reduction={reduction!r}, wanted reduction='mean'")
    tokens = TokenBatch.of(
        hidden, weight, targets, bias, ignore_index, token_weights, teacher_hidden, teacher_weight
    )  # fmt: skip
    problem, part = tokens.problem, eps if teacher_hidden is None else share
    if reduction == "none":
        t = tile.softmax(problem, cols=False, gap=eps > 0)
        return tokens.spread(t.nll if t.gap is None else t.nll + part * t.gap)
    total = tile.weighted_rows(problem, tokens.weights, part if eps or teacher_hidden is not None else 0.0)
    total = total if collectives is None else collectives.total(total)
    if reduction == "sum":
        return total
    size = tokens.weights.sum()
    if isinstance(normalizer, Tensor) and not normalizer.is_floating_point():
        normalizer = normalizer.to(size.dtype)  # a count
    if normalizer is not None:
        size = check.scalar("normalizer", normalizer, problem.x, size.dtype, positive=True)
    size = size if collectives is None else collectives.total(size)
    return total / torch.where(size == 0, 1.0, size)


def _oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, token_weights: Tensor | None = None, teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None, alpha: float = 0.4, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense logits."""
    shape, targets = targets.shape, targets.flatten()
    z = hidden.flatten(0, -2) @ weight.T + (0.0 if bias is None else bias)
    counts = targets != ignore_index
    y = F.one_hot(targets.masked_fill(~counts, 0), z.shape[1]).to(z.dtype)
    q = (1 - label_smoothing) * y + label_smoothing / z.shape[1]
    if teacher_hidden is not None and teacher_weight is not None:
        u = teacher_hidden.detach().flatten(0, -2) @ teacher_weight.detach().T
        q = (1 - alpha) * y + alpha * u.softmax(1)
    w = counts.to(z.dtype) * (1.0 if token_weights is None else token_weights.flatten())
    each = w * (z.logsumexp(1) - (q * z).sum(1))
    if reduction == "none":
        return each.reshape(shape)
    mean: Tensor = each.sum() / torch.where(w.sum() == 0, 1.0, w.sum())
    return mean if reduction == "mean" else each.sum()


SPEC = register(
    LossSpec(
        function=linear_cross_entropy,
        oracle=_oracle,
        equation="mean_t [LSE_v z_tv − z_t,y], z = hidden weightᵀ + bias",
        paper="Devlin et al. 2019 (BERT); Wijmans et al. 2024 (Cut Cross-Entropy)",
        variants=(
            {"targets": all_targets},
            {"targets": some_targets, "bias": Learned(some_bias)},
            {"targets": some_targets, "bias": Learned(some_bias), "label_smoothing": 0.1,
             "token_weights": Learned(some_weights)},
            {"targets": some_targets, "teacher_hidden": some_teacher, "teacher_weight": some_teacher_weight},
            {"targets": some_targets, "bias": Learned(some_bias), "reduction": "none"},
            {"targets": all_targets, "reduction": "sum", "label_smoothing": 0.2},
        ),
        names={"image_features": "hidden", "text_features": "weight"},
        cost=(1, 3),
    )
)  # fmt: skip
