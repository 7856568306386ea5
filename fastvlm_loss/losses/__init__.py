"""One file a loss: equation, typed function, oracle, registration."""

from ._metrics import BatchMetrics
from ._negatives import BatchNegatives
from ._spec import Learned, LossSpec, documented, parameters, registry
from .caption import caption_loss
from .clip import clip_loss
from .graded import graded_clip_loss
from .hard_negative import hard_negative_clip_loss
from .itm import itm_loss
from .itm_pairs import ITMBatch, itm_batch
from .late_interaction import late_interaction_loss
from .linear_ce import linear_cross_entropy
from .margin import margin_clip_loss
from .multiscale import MultiscaleScores, multiscale_itm
from .multiscale_loss import multiscale_itm_loss
from .relevance import relevance_clip_loss
from .siglip import siglip_loss
from .soft_target import soft_target_clip_loss
from .triplet import triplet_loss
from .vqa import vqa_loss

__all__ = [
    "BatchMetrics", "BatchNegatives", "ITMBatch", "Learned", "LossSpec", "MultiscaleScores", "caption_loss",
    "clip_loss", "documented", "graded_clip_loss", "hard_negative_clip_loss", "itm_batch", "itm_loss",
    "late_interaction_loss", "linear_cross_entropy", "margin_clip_loss", "multiscale_itm", "multiscale_itm_loss",
    "parameters", "registry", "relevance_clip_loss", "siglip_loss", "soft_target_clip_loss", "triplet_loss", "vqa_loss",
]  # fmt: skip
