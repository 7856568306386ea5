"""InfoNCE against soft targets: the softmax of a teacher's scores, or a mix of it with the hard targets.

t_ij = teacher_scale <teacher_image_i, teacher_text_j>      Q^image = softmax over j of t, Q^text over i
l^image_i = (1 - a) [LSE_j s_ij - s_ii] + a [LSE_j s_ij - sum_j Q^image_ij s_ij]      l^text_j likewise
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..scores import check
from ._batch import Batch, Options
from ._oracle import entries, log_sum, matrix, mean_of, some_ids, some_weights
from ._reduce import unit_features
from ._spec import Learned, LossSpec, register

__all__ = ["soft_target_clip_loss"]


@eager_in_group
def soft_target_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_scale: Tensor | float | None = None,
    alpha: float = 1.0,
    teacher_grad: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """InfoNCE whose targets are a teacher's beliefs, given as factors and never as a matrix.

    Use it to distil a larger model or a momentum copy, or where a batch holds many half-matches that one-hot targets
    would repel.

    alpha = 1 with a teacher's own scale is the distillation term of open_clip's DistillClipLoss; alpha = 0.4 (ramped up
    from 0) with momentum features and the student's scale is the momentum distillation of ALBEF and BLIP; any pairwise
    relevance that is a product of features serves as well. The teacher's scores cost E/D of a product forward and as
    much backward.

    Args:
        image_features, text_features, logit_scale, logit_bias: as of `clip_loss`.
        teacher_image_features, teacher_text_features: `[M, E]`, `[N, E]`, the dtype and device of the features.
        teacher_scale: number or tensor `[]` or `[1]`; None takes the student's, without its gradient.
        alpha: in [0, 1], share of the soft targets.
        teacher_grad: whether the teacher's features and scale have gradients (for E = D all products of `clip_loss`
            once more).
        **options: labels, image_ids, text_ids, filters, image_weights, text_weights, directions, normalize (of all
            features), reduction, metrics, negatives, group, check_finite, strict as of `clip_loss`. What leaves the
            candidates leaves the teacher's softmax too.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale, weights and, if asked, the teacher. With teacher = student it is the entropy of Q, and has no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Li et al. 2021 (ALBEF), equations 6 and 7; Hinton et al. 2015, section 2.
    """
    share = check.number("alpha", alpha, low=0.0, most=1.0)
    if not check.flag("teacher_grad", teacher_grad):
        teacher_image_features, teacher_text_features = (
            t.detach() if isinstance(t, Tensor) else t for t in (teacher_image_features, teacher_text_features)
        )
        teacher_scale = teacher_scale.detach() if isinstance(teacher_scale, Tensor) else teacher_scale
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, **options)
    if options.get("normalize"):
        names = "teacher_image_features", "teacher_text_features"
        teacher_image_features, teacher_text_features = unit_features(
            teacher_image_features, teacher_text_features, names
        )
    scale = batch.problem.scale.detach() if teacher_scale is None else teacher_scale
    batch = batch.but(problem=batch.problem.taught(teacher_image_features, teacher_text_features, scale))
    if options.get("check_finite"):
        check.finite("teacher_image_features", teacher_image_features)
        check.finite("teacher_text_features", teacher_text_features)
    t = batch.softmax()
    assert t.gap is not None
    return batch.reduce(t.nll + share * t.gap, t)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, teacher_image_features: Tensor, teacher_text_features: Tensor,
    teacher_scale: Tensor | float | None = None, alpha: float = 1.0, teacher_grad: bool = False,
    labels: Tensor | None = None, image_ids: Tensor | None = None, text_ids: Tensor | None = None,
    image_weights: Tensor | None = None, directions: str = "both",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrices."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias)
    own = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    _, t = matrix(teacher_image_features, teacher_text_features, own if teacher_scale is None else teacher_scale)
    t = t if teacher_grad else t.detach()
    y, present, same = entries(c, labels, image_ids, text_ids)
    live = present & (y | ~same)

    def losses(both: Tensor, y: Tensor, live: Tensor) -> Tensor:
        s, t = both.unbind(2)
        some = live.any(1, keepdim=True)
        q = torch.where(live, torch.where(some, t, 0.0).masked_fill(~(live | ~some), -torch.inf).softmax(1), 0.0)
        hard = y.to(s.dtype) / y.sum(1, keepdim=True).clamp(min=1)
        return log_sum(s, live) - (((1 - alpha) * hard + alpha * q) * s).sum(1)

    sides = (torch.stack([s, t], 2), y, live), (torch.stack([s.T, t.T], 2), y.T, live.T)
    return mean_of(losses, sides, (image_weights, None), directions)


def _features(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    wide = max(d // 2, 1)
    features: Tensor = torch.nn.functional.normalize(torch.randn(m, wide, generator=g, dtype=torch.float64), dim=1)
    return features.to(device)


def _text_features(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    return _features(n, n, device, g, d)


TEACHER = {"teacher_image_features": _features, "teacher_text_features": _text_features}
LEARNED = {name: Learned(make) for name, make in TEACHER.items()}

SPEC = register(
    LossSpec(
        function=soft_target_clip_loss,
        oracle=_oracle,
        equation="½ mean_i H(Q_i, P_i) + ½ mean_j H(Q_j, P_j), Q = (1 − a) one-hot + a softmax t",
        paper="Li et al. 2021 (ALBEF), equations 6 and 7",
        variants=(
            {**TEACHER, "teacher_scale": 8.0},
            {**TEACHER, "alpha": 0.4, "image_ids": some_ids, "image_weights": some_weights},
            {**TEACHER, "alpha": 0.4, "directions": "text", "teacher_scale": 20.0},
            {**LEARNED, "teacher_scale": 8.0, "teacher_grad": True, "image_ids": some_ids},
            {**LEARNED, "teacher_scale": 3.0, "teacher_grad": True, "directions": "image"},
        ),
        cost=(1.5, 5),
    )
)
