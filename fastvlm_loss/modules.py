"""`nn.Module`s derived from the functions' own signatures: options at construction, tensors in `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .losses import (
    caption_loss,
    clip_loss,
    graded_clip_loss,
    hard_negative_clip_loss,
    itm_loss,
    late_interaction_loss,
    linear_cross_entropy,
    margin_clip_loss,
    multiscale_itm_loss,
    parameters,
    relevance_clip_loss,
    siglip_loss,
    soft_target_clip_loss,
    triplet_loss,
    vqa_loss,
)

__all__ = [
    "CLIPLoss", "CaptionLoss", "GradedCLIPLoss", "HardNegativeCLIPLoss", "ITMLoss", "LateInteractionLoss",
    "LinearCrossEntropyLoss", "LossModule", "MarginCLIPLoss", "MultiscaleITMLoss", "RelevanceCLIPLoss", "SigLIPLoss",
    "SoftTargetCLIPLoss", "TripletLoss", "VQALoss",
]  # fmt: skip


class LossModule(torch.nn.Module):
    """Holds a loss function's keyword options; `forward` takes its tensors and may override options.

    Raises:
        TypeError: an option that the function does not have, with the list of those it has.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = parameters(type(self).function).values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY and not _is_tensor(str(p.annotation))]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"{name}: got an unknown option of {type(self).__name__}, wanted one of {', '.join(names)}"
                )
        self.options = options

    def forward(self, *tensors: Any, **more: Any) -> Tensor:
        """The function's value; see its documentation for names and shapes."""
        return type(self).function(*tensors, **{**self.options, **more})

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _is_tensor(annotation: str) -> bool:
    return "Tensor" in annotation and "float" not in annotation


class CLIPLoss(LossModule):
    """`clip_loss` as a module: `CLIPLoss(label_smoothing=0.1)(image_features, text_features, logit_scale)`."""

    function = staticmethod(clip_loss)


class SigLIPLoss(LossModule):
    """`siglip_loss` as a module: `SigLIPLoss()(image_features, text_features, logit_scale, logit_bias)`."""

    function = staticmethod(siglip_loss)


class RelevanceCLIPLoss(LossModule):
    """`relevance_clip_loss` as a module: `RelevanceCLIPLoss()(image, text, logit_scale, image_relevance=r)`."""

    function = staticmethod(relevance_clip_loss)


class GradedCLIPLoss(LossModule):
    """`graded_clip_loss` as a module; texts and grades go to `forward`, by name."""

    function = staticmethod(graded_clip_loss)


class SoftTargetCLIPLoss(LossModule):
    """`soft_target_clip_loss` as a module; the teacher's features go to `forward`, by name."""

    function = staticmethod(soft_target_clip_loss)


class HardNegativeCLIPLoss(LossModule):
    """`hard_negative_clip_loss` as a module: `HardNegativeCLIPLoss(beta=0.5)(image, text, logit_scale)`."""

    function = staticmethod(hard_negative_clip_loss)


class MarginCLIPLoss(LossModule):
    """`margin_clip_loss` as a module; `text_embeddings` goes to `forward`, by name."""

    function = staticmethod(margin_clip_loss)


class TripletLoss(LossModule):
    """`triplet_loss` as a module: `TripletLoss(mining="max")(image_features, text_features)`."""

    function = staticmethod(triplet_loss)


class LateInteractionLoss(LossModule):
    """`late_interaction_loss` as a module: `LateInteractionLoss()(image_tokens, text_tokens, logit_scale)`."""

    function = staticmethod(late_interaction_loss)


class ITMLoss(LossModule):
    """`itm_loss` as a module: `ITMLoss()(logits, pairs.labels, pairs.weights)`."""

    function = staticmethod(itm_loss)


class MultiscaleITMLoss(LossModule):
    """`multiscale_itm_loss` as a module: `MultiscaleITMLoss(mode="hard")(patches, texts, pairs, scale, bias)`."""

    function = staticmethod(multiscale_itm_loss)


class LinearCrossEntropyLoss(LossModule):
    """`linear_cross_entropy` as a module: `LinearCrossEntropyLoss()(hidden, weight, targets, bias)`."""

    function = staticmethod(linear_cross_entropy)


class CaptionLoss(LossModule):
    """`caption_loss` as a module: `CaptionLoss(pad_id=0)(hidden, weight, tokens, bias)`."""

    function = staticmethod(caption_loss)


class VQALoss(LossModule):
    """`vqa_loss` as a module: `VQALoss(pad_id=0)(hidden, weight, tokens, answer_weights, images)`."""

    function = staticmethod(vqa_loss)
