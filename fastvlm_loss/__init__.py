"""Losses for vision-language pre-training that never build the batch x batch similarity matrix."""

from ._version import __version__
from .engine.dispatch import backend
from .losses import clip_loss
from .modules import CLIPLoss

__all__ = ["CLIPLoss", "__version__", "backend", "clip_loss"]
