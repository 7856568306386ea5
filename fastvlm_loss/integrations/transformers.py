"""`model(..., return_loss=True)` of the two-tower models of transformers, without the matrix of logits.

A model's own forward runs as it is written, over a namespace in which `torch.matmul` of the two sides' features gives
the products 0 and 1 instead of N x N of them: what the forward makes of those tells scale and bias, and the loss is
ours, of the features in its output. Rewritten forwards would be sixteen copies that age; a mode that catches the
product would stand between PyTorch and every operator of the encoders. Here they run untouched, and torch.compile,
checkpointing, autocast and DDP meet plain tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from fastvlm_loss import clip_loss, siglip_loss

from ._patch import Patch
from ._versions import require

__all__ = ["patch_transformers"]


def patch_transformers(model_or_class: Any, *, group: object = None) -> Patch:
    """Let `model(..., return_loss=True)` compute the model's own loss without its N x N logits.

    Value and gradients are those of the unpatched model, to rounding; the loss is fp32 (fp64 for fp64 features) in any
    dtype of the model. Without `return_loss` the unpatched forward runs.

        patch_transformers(CLIPModel)          # all its instances, until undo() of what is returned
        with patch_transformers(model):        # or this one, until the end of the block
            ...

    With `return_loss=True` the output's `logits_per_image`, `logits_per_text` and `logits_per_speech` are None. They
    are no entries of the output then, so `to_tuple` and `return_dict=False` go from the loss straight to the
    embeddings, `nn.DataParallel` gathers the others, and the evaluation of a `Trainer` collects embeddings, of which
    the logits of a whole data set can be made. The second product of GroupViT's `output_segmentation` is still made.

    Args:
        model_or_class: a model or a class of models of transformers: ALIGN, AltCLIP, BLIP (`BlipModel`), BridgeTower
            (`BridgeTowerForContrastiveLearning`), Chinese-CLIP, CLIP, CLIPSeg (`CLIPSegModel`), CLVP, GroupViT,
            MetaCLIP 2, OWLv2, OWL-ViT, SigLIP, SigLIP 2, TIPSv2 and VisionTextDualEncoder, or a subclass that leaves
            `forward` alone. A model is patched before a `Trainer` or accelerate wraps its forward; for
            `nn.DataParallel`, whose copies share what a model holds itself, patch the class.
        group: as of `clip_loss`. None keeps each process to its own negatives, as transformers does; beside a group the
            loss is that of the samples of all its processes, and DDP's mean of the gradients is right.

    Returns:
        What undoes it, by `undo()` or as a context manager. Patched again, with another group too, a model follows the
        last patch until that is undone.

    Raises:
        ImportError: a version of transformers that this was not made for.
        TypeError: a model that is not covered, or whose published loss is not ours to match, and why.
    """
    require("transformers")
    cls: Any = model_or_class if isinstance(model_or_class, type) else type(model_or_class)
    loss = _loss_of(cls)
    forward = _patched(cls.forward, loss, group)
    patch = Patch()
    if cls is model_or_class:
        patch.set(cls, "forward", forward)
        return patch
    if not hasattr(vars(model_or_class).get("forward", forward), _UNPATCHED):
        raise TypeError(f"model_or_class: got a {cls.__name__} whose forward is wrapped already, wanted it before that")
    patch.set(model_or_class, "forward", MethodType(forward, model_or_class))
    return patch


def _factors(output: Any, image: str = "image_embeds") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features `[N, D]` of images (or speech) and of texts, scale and bias `[]`: what a forward left in its output."""
    x, y = getattr(output, image), output.text_embeds
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"return_loss: got True for {y.shape[0]} texts beside {x.shape[0]} images, wanted pairs")
    bias, top = output.logits_per_text.flatten().unbind()
    return x.to(y.device), y, top - bias, bias


def _clip(model: Any, output: Any, group: object) -> Tensor:
    return clip_loss(*_factors(output)[:3], group=group)


def _clvp(model: Any, output: Any, group: object) -> Tensor:
    return clip_loss(*_factors(output, "speech_embeds")[:3], group=group)


def _align(model: Any, output: Any, group: object) -> Tensor:
    return clip_loss(*_factors(output)[:3], label_smoothing=0.1, group=group)


def _tipsv2(model: Any, output: Any, group: object) -> Tensor | None:
    return None if output.logits_per_text is None else _clip(model, output, group)  # one side alone has no loss


def _siglip(model: Any, output: Any, group: object) -> Tensor:
    return siglip_loss(*_factors(output), group=group)


def _bridgetower(model: Any, output: Any, group: object) -> Tensor:
    text, image, cross = output.text_embeds, output.image_embeds, output.cross_embeds
    scale = model.logit_scale.exp()
    losses = [
        clip_loss(anchors, candidates, scale, directions="image", group=group)
        for anchors, candidates in ((text, image), (text, cross), (image, cross))
    ]
    return torch.stack(losses).mean()


_Loss = Callable[[Any, Any, object], Tensor | None]
# by module and class
_COVERED: dict[str, _Loss] = {
    "align.AlignModel": _align,
    "altclip.AltCLIPModel": _clip,
    "blip.BlipModel": _clip,
    "bridgetower.BridgeTowerForContrastiveLearning": _bridgetower,
    "chinese_clip.ChineseCLIPModel": _clip,
    "clip.CLIPModel": _clip,
    "clipseg.CLIPSegModel": _clip,
    "clvp.ClvpModelForConditionalGeneration": _clvp,
    "groupvit.GroupViTModel": _clip,
    "metaclip_2.MetaClip2Model": _clip,
    "owlv2.Owlv2Model": _clip,
    "owlvit.OwlViTModel": _clip,
    "siglip.SiglipModel": _siglip,
    "siglip2.Siglip2Model": _siglip,
    "tipsv2.Tipsv2Model": _tipsv2,
    "vision_text_dual_encoder.VisionTextDualEncoderModel": _clip,
}
_NO_NEGATIVES = "its labels of 0 and 1, where a sigmoid loss has -1 and 1, leave out the negatives"
_REFUSED = {
    "clap.ClapModel": "its loss takes the texts' direction twice, and never ranks the texts of an audio",
    "flava.FlavaForPreTraining": "its contrastive loss is one of six, made of logits that it gathers by itself",
    "pe_audio.PeAudioModel": _NO_NEGATIVES,
    "pe_audio.PeAudioFrameLevelModel": _NO_NEGATIVES,
    "pe_audio_video.PeAudioVideoModel": _NO_NEGATIVES,
    "pe_video.PeVideoModel": _NO_NEGATIVES,
    "videoprism.VideoPrismClipModel": "its sigmoid loss is of probabilities, which a softmax over the batch made",
    "x_clip.XCLIPModel": "every video has texts' features of its own, so its scores are no product of two matrices",
}
_UNPATCHED = "_fastvlm_loss_unpatched"


def _loss_of(cls: type) -> _Loss:
    """The loss of a covered model, found by the class that wrote its forward.

    Raises:
        TypeError: no such model.
    """
    owner = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    key = f"{owner.__module__.removeprefix('transformers.models.').split('.')[0]}.{owner.__name__}"
    if owner.__module__.startswith("transformers.models.") and key in _COVERED:
        return _COVERED[key]
    why = f", not patched because {_REFUSED[key]}" if key in _REFUSED else ""
    names = ", ".join(sorted(name.split(".")[1] for name in _COVERED))
    raise TypeError(f"model_or_class: got {cls.__name__} (forward of {owner.__name__}){why}; wanted one of {names}")


def _patched(forward: Callable[..., Any], loss: _Loss, group: object) -> Callable[..., Any]:
    """A forward that takes its loss from ours, if one is wanted."""
    unpatched: Callable[..., Any] = getattr(forward, _UNPATCHED, forward)
    deferring = _deferring(unpatched)
    names = deferring.__code__.co_varnames[1 : deferring.__code__.co_argcount]

    @functools.wraps(unpatched)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or not named.get("return_loss"):
            return unpatched(self, *args, **kwargs)
        as_dict = named.pop("return_dict", None)
        if "return_dict" in names:
            named["return_dict"] = True
        output = deferring(self, **{**named, "return_loss": False})
        rest = {name: value for name, value in output.items() if not name.startswith("logits_per_")}
        output = type(output)(loss=loss(self, output, group), **rest)
        return output if (self.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    # for those who read the parameters; accelerate, when it takes its wrappers off, would go on to what is wrapped here
    del patched.__wrapped__
    patched.__signature__ = inspect.signature(unpatched)  # type: ignore[attr-defined]
    setattr(patched, _UNPATCHED, unpatched)
    return patched


def _deferring(forward: Callable[..., Any]) -> FunctionType:
    """A forward, without its decorators, over a namespace in which the product of two sides is not made."""
    raw: Any = inspect.unwrap(forward)
    namespace = ModuleType("torch")
    vars(namespace).update({**vars(torch), "matmul": _matmul})
    made = FunctionType(
        raw.__code__, {**raw.__globals__, "torch": namespace}, raw.__name__, raw.__defaults__, raw.__closure__
    )
    made.__kwdefaults__ = raw.__kwdefaults__
    return made


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of the features `[N, D]` and `[D, N]` of two sides: the products 0 and 1, `[2, 1]`, fp32 or fp64."""
    if a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]:
        return torch.arange(2, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)[:, None]
    return torch.matmul(a, b)
