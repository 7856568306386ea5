"""Losses for vision-language pre-training that never build the batch x batch similarity matrix."""

import importlib.util
from pathlib import Path

# the kernels stand beside the package in the sources and inside it once installed: a bare checkout works too
if importlib.util.find_spec(f"{__name__}.kernels") is None:
    __path__.append(str(Path(__file__).parents[1]))

from . import filters
from ._version import __version__
from .backends.triton import set_workspace
from .distributed import set_gather_limit
from .engine.dispatch import backend
from .gradcache import cached_step
from .heads import MatchingHead
from .losses import (
    BatchMetrics,
    BatchNegatives,
    ITMBatch,
    MultiscaleScores,
    caption_loss,
    clip_loss,
    graded_clip_loss,
    hard_negative_clip_loss,
    itm_batch,
    itm_loss,
    late_interaction_loss,
    linear_cross_entropy,
    margin_clip_loss,
    multiscale_itm,
    multiscale_itm_loss,
    relevance_clip_loss,
    siglip_loss,
    soft_target_clip_loss,
    triplet_loss,
    vqa_loss,
)
from .modules import (
    CaptionLoss,
    CLIPLoss,
    GradedCLIPLoss,
    HardNegativeCLIPLoss,
    ITMLoss,
    LateInteractionLoss,
    LinearCrossEntropyLoss,
    MarginCLIPLoss,
    MultiscaleITMLoss,
    RelevanceCLIPLoss,
    SigLIPLoss,
    SoftTargetCLIPLoss,
    TripletLoss,
    VQALoss,
)
from .negatives import HardNegatives, LinearHardness, hard_negatives
from .queue import FeatureQueue

__all__ = [
    "BatchMetrics",
    "BatchNegatives",
    "CLIPLoss",
    "CaptionLoss",
    "FeatureQueue",
    "GradedCLIPLoss",
    "HardNegativeCLIPLoss",
    "HardNegatives",
    "ITMBatch",
    "ITMLoss",
    "LateInteractionLoss",
    "LinearCrossEntropyLoss",
    "LinearHardness",
    "MarginCLIPLoss",
    "MatchingHead",
    "MultiscaleITMLoss",
    "MultiscaleScores",
    "RelevanceCLIPLoss",
    "SigLIPLoss",
    "SoftTargetCLIPLoss",
    "TripletLoss",
    "VQALoss",
    "__version__",
    "backend",
    "cached_step",
    "caption_loss",
    "clip_loss",
    "filters",
    "graded_clip_loss",
    "hard_negative_clip_loss",
    "hard_negatives",
    "itm_batch",
    "itm_loss",
    "late_interaction_loss",
    "linear_cross_entropy",
    "margin_clip_loss",
    "multiscale_itm",
    "multiscale_itm_loss",
    "relevance_clip_loss",
    "set_gather_limit", "set_workspace",
    "siglip_loss",
    "soft_target_clip_loss",
    "triplet_loss",
    "vqa_loss",
]  # fmt: skip
