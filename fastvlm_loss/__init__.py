"""Losses for vision-language pre-training that never build the batch x batch similarity matrix."""

from .engine.dispatch import backend
from .losses import clip_loss
from .modules import CLIPLoss

__version__ = "0.1.0"

__all__ = ["CLIPLoss", "__version__", "backend", "clip_loss"]
