"""The model of the reference trainer: two towers, a fusion encoder, and their heads."""

from .config import FusionConfig, ImageConfig, LoraConfig, ModelConfig, TextConfig, Vocabulary, preset
from .model import VLPretrainModel

__all__ = [
    "FusionConfig", "ImageConfig", "LoraConfig", "ModelConfig", "TextConfig", "VLPretrainModel", "Vocabulary", "preset",
]  # fmt: skip
