"""Late interaction: InfoNCE on scores that sum the best match of every token (FILIP, ColBERT's MaxSim).

a_ij = sum_p w_ip max_t <x_ip, y_jt>     how well text j explains the tokens p of image i
b_ij = sum_t v_jt max_p <x_ip, y_jt>     how well image i explains the tokens t of text j
w_ip = r_ip / sum_p r_ip, likewise v of the texts' relevance; "colbert": times the number of tokens, a sum for a mean
L    = ( mean_i [LSE_j alpha a_ij - alpha a_ii] + mean_j [LSE_i alpha b_ij - alpha b_jj] ) / 2
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..engine import interaction as engine
from ..scores import check
from ..scores.interaction import Interaction, Tokens
from ._batch import Batch, PairOptions, insist, refuse, smoothing
from ._oracle import TOKENS, cross_entropy, entries, log_sum, mean_of, some_ids, some_token_options, some_weights
from ._reduce import unit
from ._spec import Learned, LossSpec, register

__all__ = ["late_interaction_loss"]


@eager_in_group
def late_interaction_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_relevance: Tensor | None = None,
    text_relevance: Tensor | None = None,
    interaction: Literal["filip", "colbert"] = "filip",
    positives: Literal["mask", "out", "in"] = "mask",
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[PairOptions],
) -> Tensor:
    """Contrastive loss of token sets: every token's best match on the other side, without the scores of the pairs.

    Use it where patches should find their words: towers that give a vector a patch and a vector a token instead of one
    each. Neither the M x N x P x T products nor the M x N scores are held: beside the tokens, their gradients and
    vectors of M and N, one tile of products (16 MB on a CPU, 64 on a GPU). All products are made twice, once in forward
    and once in backward, where each best match takes its gradient by its place: 4 M N P T D operations.

    The two directions have scores of their own: images choose by a_ij, texts by b_ij. With one token each it is
    `clip_loss`. Where several tokens match equally well, the first has the gradient. All of it is PyTorch and in fp32
    (fp64 for fp64 tokens), on any device.

    Args:
        image_tokens: `[M, P, D]`, fp64, fp32, bf16 or fp16, P >= 1; each token L2-normalised by the caller, or
            `normalize=True`. Under autocast they are cast to its dtype, as a matmul's operands are.
        text_tokens: `[N, T, D]`, same dtype and device.
        logit_scale, logit_bias: as of `clip_loss`; with "colbert" the scores are P (T) times as large.
        image_mask, text_mask: bool `[M, P]`, `[N, T]`, False for padding, which is nobody's match, has no weight and no
            gradient, whatever stands there; None for none. An image or text without any token takes no part, as with
            an id of -1.
        image_relevance, text_relevance: `[M, P]`, `[N, T]`, >= 0, the weight of each token in the scores of its own
            side; each image's (text's) are divided by their sum, so their size does not matter. None: all count alike,
            as where all are 0. What is negative or not finite counts as 0 (with `check_finite` it is an error). A token
            of relevance 0 can still be the best match of others. Differentiable.
        interaction: "filip", scores are weighted means over the tokens; "colbert", sums, so that long texts have large
            scores.
        positives, label_smoothing, reduction: as of `clip_loss`.
        **options: labels, image_ids, text_ids, image_weights, text_weights, directions, normalize (each token),
            metrics, group, check_finite, strict as of `clip_loss`; labels, ids and weights are those of whole images
            and texts. With a group T is the same in all its processes, P need not be; the texts' tokens are gathered,
            or travel, as the features of `clip_loss`.

    Returns:
        fp32 scalar (fp64 for fp64 tokens), or per-sample losses for reduction="none". Differentiable in tokens, scale,
        bias (exactly 0), relevance and weights; empty batches give 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Yao et al. 2022 (FILIP), equations 4 and 5; Khattab and Zaharia 2020 (ColBERT), equation 3.
    """
    check.choice("interaction", interaction, ("filip", "colbert"))
    eps = smoothing(label_smoothing, positives)
    refuse(sorted(options.keys() - PairOptions.__annotations__))
    directions, metrics = options.get("directions", "both"), options.get("metrics")
    unit_tokens = check.flag("normalize", options.pop("normalize", False))
    strict, finite = check.flag("strict", options.pop("strict", False)), options.get("check_finite", False)
    images, texts = Tokens.both(
        (image_tokens, text_tokens), (image_mask, text_mask), (image_relevance, text_relevance), directions, finite
    )
    batch = Batch.of(
        images.first(), texts.first(), logit_scale, logit_bias, reduction=reduction, tokens=texts.features.shape[1],
        agreed=(interaction, image_mask, text_mask, image_relevance, text_relevance, unit_tokens), **options,
    )  # fmt: skip
    x, y = (unit(t) if unit_tokens else t for t in (images.filled(), texts.filled()))
    tokens = Interaction.of(batch.problem, images, texts, x, y, summed=interaction == "colbert")
    if strict:
        insist(tokens.pairs, positives, directions)
    t = engine.softmax(
        tokens, gap=eps > 0, rows=directions != "text", cols=directions != "image", positives=positives,
        hardest=metrics is not None,
    )  # fmt: skip
    if metrics is not None:
        metrics.fill(t, tokens.pairs.m, tokens.pairs.n, filters=False)
    return batch.smoothed(t, eps)


def _oracle(
    image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None, *,
    image_mask: Tensor | None = None, text_mask: Tensor | None = None, image_relevance: Tensor | None = None,
    text_relevance: Tensor | None = None, interaction: str = "filip", labels: Tensor | None = None,
    image_ids: Tensor | None = None, text_ids: Tensor | None = None, positives: str = "mask",
    label_smoothing: float = 0.0, image_weights: Tensor | None = None, text_weights: Tensor | None = None,
    directions: str = "both", normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on all products `[M, N, P, T]`."""
    x, y = (F.normalize(t, dim=-1) if normalize else t for t in (image_tokens, text_tokens))
    real = [
        t.new_ones(t.shape[:2], dtype=torch.bool) if mask is None else mask
        for t, mask in ((x, image_mask), (y, text_mask))
    ]
    products = torch.einsum("ipd,jtd->ijpt", x, y)
    real_x, real_y = real[0][:, None, :, None], real[1][None, :, None, :]
    products = products.masked_fill(~(real_x & real_y), -torch.inf)
    matched = products.isfinite().any(3), products.isfinite().any(2)
    best_text = products.max(3).values.masked_fill(~matched[0], 0.0)  # [M, N, P]
    best_image = products.max(2).values.masked_fill(~matched[1], 0.0)  # [M, N, T]
    shares = []
    for r, mask in zip((image_relevance, text_relevance), real, strict=True):
        r = mask.to(products.dtype) if r is None else torch.where(mask, r, 0.0)
        share = r / r.sum(1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
        shares.append(share * mask.sum(1, keepdim=True) if interaction == "colbert" else share)
    a = torch.einsum("ip,ijp->ij", shares[0], best_text)
    b = torch.einsum("jt,ijt->ij", shares[1], best_image)
    pair, present, same = entries(a, labels, image_ids, text_ids)
    present = present & real[0].any(1)[:, None] & real[1].any(1)
    hit = (pair if positives == "mask" else pair | same) & present

    def losses(z: Tensor, hit: Tensor, live: Tensor) -> Tensor:
        z = torch.where(live, z, 0.0)
        if positives == "in":
            return log_sum(z, live) - log_sum(z, hit)
        return cross_entropy(z, hit, live, label_smoothing)

    live, beta = present & (hit | ~same), 0.0 if logit_bias is None else logit_bias
    sides = (logit_scale * a + beta, hit, live), ((logit_scale * b + beta).T, hit.T, live.T)
    return mean_of(losses, sides, (image_weights, text_weights), directions, reduction)


MASKS, RELEVANCE = some_token_options()
SPEC = register(
    LossSpec(
        function=late_interaction_loss,
        oracle=_oracle,
        equation="½ mean_i [LSE_j αa_ij − αa_ii] + ½ mean_j [LSE_i αb_ij − αb_jj], a_ij = Σ_p w_ip max_t ⟨x_ip, y_jt⟩",
        paper="Yao et al. 2022 (FILIP), equations 4 and 5",
        variants=(
            {},
            {"interaction": "colbert"},
            MASKS,
            {**MASKS, **RELEVANCE, "image_ids": some_ids, "interaction": "colbert"},
            {"image_relevance": RELEVANCE["image_relevance"], "directions": "image", "label_smoothing": 0.1},
            {"text_relevance": RELEVANCE["text_relevance"], "directions": "text", "image_mask": MASKS["image_mask"]},
            {"image_ids": some_ids, "positives": "out", "label_smoothing": 0.1, "image_weights": Learned(some_weights)},
            {"image_ids": some_ids, "positives": "in", "text_mask": MASKS["text_mask"]},
            {"normalize": True, "reduction": "sum"},
            {"reduction": "none", "text_ids": some_ids, "text_mask": MASKS["text_mask"]},
        ),
        names={"image_features": "image_tokens", "text_features": "text_tokens"},
        tokens=TOKENS,
    )
)
