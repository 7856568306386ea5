"""Losses for vision-language pre-training that never build the batch x batch similarity matrix."""

import importlib.util
from pathlib import Path

# the kernels stand beside the package in the sources and inside it once installed: a bare checkout works too
if importlib.util.find_spec(f"{__name__}.kernels") is None:
    __path__.append(str(Path(__file__).parents[1]))

from ._version import __version__
from .backends.triton import set_workspace
from .engine.dispatch import backend
from .losses import clip_loss, siglip_loss
from .modules import CLIPLoss, SigLIPLoss

__all__ = ["CLIPLoss", "SigLIPLoss", "__version__", "backend", "clip_loss", "set_workspace", "siglip_loss"]
