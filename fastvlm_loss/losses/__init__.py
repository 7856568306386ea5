"""One file a loss: equation, typed function, oracle, registration."""

from ._spec import LossSpec, registry
from .clip import clip_loss
from .siglip import siglip_loss

__all__ = ["LossSpec", "clip_loss", "registry", "siglip_loss"]
