"""What a stage trains of the model: the groups that it names, as far as its objectives reach them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .model import VLPretrainModel
from .model.config import LOCAL
from .stages import Stage

__all__ = ["freeze", "learners", "parameters_of"]

_FUSED = ("itm", "mlm", "caption", "vqa")
_HEADS = {"match": ("itm",), "answers": ("vqa",), **{name: (name,) for name in LOCAL}}


def learners(model: VLPretrainModel, stage: Stage, only: Collection[str] | None = None) -> set[nn.Parameter]:
    """The parameters that a stage trains: those of its groups that its objectives, or `only` these, reach."""
    groups, tasks = model.groups(), set(stage.tasks if only is None else only)
    found = {p for name in stage.train for part in groups[name] for p in parameters_of(part)}
    patches = {*_FUSED, *LOCAL}
    users: dict[nn.Module, Collection[str]] = {
        model.fusion: _FUSED, model.bridge: patches, model.summary: patches, model.image_projection: ("itc", "itm"),
        model.text_projection: ("itc", "itm", "multiscale"), model.temperature: ("itc",),
    }  # fmt: skip
    heads = {**_HEADS, "words": ("mlm", "caption", *(() if model.config.answers else ("vqa",)))}
    users |= {head: heads[name] for name, head in model.heads.items()}
    for part, of in users.items():
        if not tasks & set(of):
            found -= set(part.parameters())
    return found - model.fixed()


def freeze(model: VLPretrainModel, stage: Stage) -> None:
    """Let learn what the stage trains; the rest has no gradient, and frozen groups are in evaluation mode."""
    learning = learners(model, stage)
    for p in model.parameters():
        p.requires_grad_(p in learning)
    model.train()
    for name, parts in model.groups().items():
        for part in parts:
            if name not in stage.train and isinstance(part, nn.Module):
                part.eval()


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """Of a module, or the parameter itself."""
    return [*part.parameters()] if isinstance(part, nn.Module) else [part]
