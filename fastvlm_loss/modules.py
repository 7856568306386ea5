"""`nn.Module`s derived from the functions' own signatures: options at construction, tensors in `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .losses import clip_loss, siglip_loss

__all__ = ["CLIPLoss", "LossModule", "SigLIPLoss"]


class LossModule(torch.nn.Module):
    """Holds a loss function's keyword options; `forward` takes its tensors and may override options.

    Raises:
        TypeError: an option that the function does not have, with the list of those it has.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(type(self).function).parameters.values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY and "Tensor" not in str(p.annotation)]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"{name}: got an unknown option of {type(self).__name__}, wanted one of {', '.join(names)}"
                )
        self.options = options

    def forward(self, image_features: Tensor, text_features: Tensor, *args: Any, **tensors: Any) -> Tensor:
        """The function's value; see its documentation for shapes."""
        return type(self).function(image_features, text_features, *args, **{**self.options, **tensors})

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CLIPLoss(LossModule):
    """`clip_loss` as a module: `CLIPLoss(label_smoothing=0.1)(image_features, text_features, logit_scale)`."""

    function = staticmethod(clip_loss)


class SigLIPLoss(LossModule):
    """`siglip_loss` as a module: `SigLIPLoss()(image_features, text_features, logit_scale, logit_bias)`."""

    function = staticmethod(siglip_loss)
