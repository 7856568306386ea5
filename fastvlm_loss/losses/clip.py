"""InfoNCE with learnable temperature, symmetric over images and texts.

s_ij = logit_scale * <image_i, text_j> + logit_bias
l^image_i = LSE_{j in V_i} s_ij - (1 - eps) s_i,pos - eps mean_{j in V_i} s_ij     l^text_j likewise over i
L = ( sum_i w_i l^image_i / sum_i w_i + sum_j v_j l^text_j / sum_j v_j ) / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..distributed import eager_in_group
from ..scores.filters import Filter, absolute
from ._batch import Batch, smoothing
from ._metrics import BatchMetrics
from ._negatives import BatchNegatives
from ._oracle import cross_entropy, entries, log_sum, matrix, mean_of, sides_of, some_ids, some_weights
from ._spec import Learned, LossSpec, register

__all__ = ["clip_loss"]


@eager_in_group
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    labels: Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Literal["mask", "out", "in"] = "mask",
    filters: Filter | Sequence[Filter] | None = None,
    label_smoothing: float = 0.0,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    directions: Literal["both", "image", "text"] = "both",
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    metrics: BatchMetrics | None = None,
    negatives: BatchNegatives | None = None,
    group: object = None,
    check_finite: bool = False,
    strict: bool = False,
) -> Tensor:
    """Contrastive loss of CLIP (InfoNCE in both directions) without the M x N score matrix.

    Use it as the default for two towers trained on pairs. Give ids where an image or a caption occurs more than once in
    a batch, `positives` where all of those should match, filters where false negatives have no id.

    Args:
        image_features: `[M, D]`, fp64, fp32, bf16 or fp16; L2-normalised by the caller, or `normalize=True`.
            Under autocast they are cast to its dtype, as a matmul's operands are.
        text_features: `[N, D]`, same dtype and device.
        logit_scale: multiplicative inverse temperature alpha = 1/tau > 0 (`exp` of CLIP's parameter, 1/0.07 to begin
            with), a number or a tensor of shape `[]` or `[1]`, differentiable. The reference document multiplies
            cosines by tau itself, an error that is not reproduced.
        logit_bias: added to every score; cancels in this loss (its gradient is exactly 0). Number or tensor.
        labels: int `[M]`, the text of each image, -1 for none; None pairs image i with text i (M = N). A text
            with several images takes the mean over them; one with none is dropped from the text direction.
        image_ids, text_ids: int `[M]`, `[N]`. What an equal id means, `positives` says. -1 takes a sample out of the
            loss (NaN in its features still reaches the gradients). One of them alone serves both, where there are no
            labels.
        positives: of entries with equal ids: "mask", they leave the candidates unless they are the target (false
            negatives); "out", they are targets and the loss is the mean over them (SupCon-out, UniCL); "in", they
            are targets and the loss is that of their summed probability (MIL-NCE), never above "out".
        filters: `fastvlm_loss.filters`, rules by which look-alikes of the target leave the candidates; several compose.
        label_smoothing: eps in [0, 1), mass spread evenly over the valid candidates; not with positives="in".
        image_weights, text_weights: `[M]`, `[N]`, weight of each anchor in its direction's mean; a weight of 0
            removes the anchor, not the negative. Meant to be >= 0; not checked. Differentiable.
        directions: "both", "image" (each image chooses among the texts) or "text".
        normalize: L2-normalise the features first (differentiably).
        reduction: "mean" (weighted mean of each direction, then their mean), "sum", or "none" (`[M]`; `[N]` for
            directions="text"; both directions need M = N).
        metrics: a `BatchMetrics` to fill with accuracies, mean scores and hardest negatives of this pass.
        negatives: a `BatchNegatives` to fill with hard negatives for image-text matching, from this pass.
        group: None, this process alone; or a `torch.distributed` process group, or one dimension of a `DeviceMesh`: the
            batch is that of all its processes, in the order of their ranks. Each gives what is its own, as many samples
            as it has, and the same options; labels are indices into the group's texts. All return the group's loss, and
            DDP's mean of the gradients is that of the whole batch (docs/distributed.md).
        check_finite: raise on NaN or infinity in the features, naming the row (synchronises on a GPU).
        strict: raise if an image or text has no positive in its direction, instead of dropping it there, naming the
            first (synchronises on a GPU). An id of -1 takes part in nothing and needs none.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale, bias and weights; empty batches give 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Radford et al. 2021 (CLIP), figure 3; van den Oord et al. 2018 (InfoNCE), equation 4; Khosla et al. 2020
        (SupCon), equation 2 ("out"); Miech et al. 2020 (MIL-NCE), equation 1 ("in").
    """
    eps = smoothing(label_smoothing, positives)
    batch = Batch.of(
        image_features, text_features, logit_scale, logit_bias, labels=labels, image_ids=image_ids, text_ids=text_ids,
        filters=filters, image_weights=image_weights, text_weights=text_weights, directions=directions,
        normalize=normalize, reduction=reduction, metrics=metrics, negatives=negatives, group=group,
        check_finite=check_finite, strict=strict, positives=positives,
    )  # fmt: skip
    return batch.smoothed(batch.softmax(gap=eps > 0, positives=positives), eps)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, labels: Tensor | None = None, image_ids: Tensor | None = None,
    text_ids: Tensor | None = None, positives: str = "mask", filters: Filter | None = None,
    label_smoothing: float = 0.0, image_weights: Tensor | None = None, text_weights: Tensor | None = None,
    directions: str = "both", normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias, normalize)
    pair, present, same = entries(c, labels, image_ids, text_ids)
    y = pair if positives == "mask" else pair | same

    def losses(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
        if positives == "in":
            return log_sum(z, live) - log_sum(z, y)
        return cross_entropy(z, y, live, label_smoothing)

    sides = sides_of(s, y, present & (y | ~same), c, filters)
    return mean_of(losses, sides, (image_weights, text_weights), directions, reduction)


SPEC = register(
    LossSpec(
        function=clip_loss,
        oracle=_oracle,
        equation="½ mean_i [LSE_j s_ij − s_ii] + ½ mean_j [LSE_i s_ij − s_jj]",
        paper="Radford et al. 2021, figure 3",
        variants=(
            {},
            {"label_smoothing": 0.1},
            {"image_ids": some_ids},
            {
                "image_ids": some_ids,
                "label_smoothing": 0.2,
                "image_weights": some_weights,
                "text_weights": some_weights,
            },
            {"directions": "image"},
            {"directions": "text", "label_smoothing": 0.1},
            {"reduction": "sum", "image_weights": Learned(some_weights)},
            {"reduction": "none", "text_ids": some_ids},
            {"normalize": True},
            {"image_ids": some_ids, "positives": "out", "label_smoothing": 0.1},
            {"image_ids": some_ids, "positives": "in", "image_weights": some_weights},
            {"image_ids": some_ids, "filters": absolute(0.1)},
        ),
    )
)
