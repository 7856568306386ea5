"""A model on disk: safetensors by plain names, and a JSON that says how to build it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .config import FusionConfig, ImageConfig, LoraConfig, ModelConfig, TextConfig, Vocabulary

if TYPE_CHECKING:
    from .model import VLPretrainModel

__all__ = ["CONFIG", "WEIGHTS", "fill", "load", "names", "plain", "save", "told"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")


def plain(name: str) -> str:
    """A parameter's name without what DDP, torch.compile, checkpointing and adapters put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def save(model: VLPretrainModel, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write both files, each complete or not at all; the weights hold the JSON too, so that `load` sees a mixture."""
    from safetensors.torch import save_file

    tensors = {plain(name): value.detach().cpu().contiguous() for name, value in state.items()}
    missing, unexpected = _differences(tensors, names(model))
    if missing or unexpected:
        raise ValueError(f"state: {told(missing, unexpected)}")
    description = {
        "format": 1,
        "model": dataclasses.asdict(model.config),
        "vocabulary": dataclasses.asdict(model.words),
    }
    text = json.dumps(description, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{WEIGHTS}.new"
    save_file(tensors, new, {"format": "pt", "config": text})
    _place(new, folder / WEIGHTS)
    new = folder / f"{CONFIG}.new"
    new.write_text(text)
    _place(new, folder / CONFIG)


def _place(new: Path, name: Path) -> None:
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(name)


def load(folder: Path, config: ModelConfig | None = None) -> VLPretrainModel:
    """Build the model that `save` wrote and fill it.

    Args:
        folder: with both files.
        config: to build it by instead; may differ in its adapters, which then start anew.

    Raises:
        FileNotFoundError: one of the files is missing, named.
        ValueError: a damaged file, another save's JSON beside the weights, or parameters that are missing, unexpected
            or of another shape, all named.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from .model import VLPretrainModel

    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not there, wanted a folder with {WEIGHTS} and {CONFIG}")
    text = (folder / CONFIG).read_text()
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            beside = (file.metadata() or {}).get("config")
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged, wanted safetensors: {error}") from error
    if beside != text:
        raise ValueError(f"{folder / CONFIG}: not of the same save as {WEIGHTS}, which says {beside}")
    found = json.loads(text)
    model = VLPretrainModel(config or _config(found["model"]), Vocabulary(**found["vocabulary"]))
    missing, unexpected = _differences(tensors, names(model))
    if config is not None:
        missing = [name for name in missing if "lora_" not in name]
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS}: {told(missing, unexpected)}")
    fill(model, tensors, str(folder / WEIGHTS))
    return model


def fill(model: VLPretrainModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters and buffers of these plain names.

    Raises:
        ValueError: shapes that differ, all named, before anything is copied.
    """
    own = names(model)
    wrong = [
        f"{name} {list(value.shape)} for {list(own[name].shape)}"
        for name, value in tensors.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{source}: got other shapes than the model has: {'; '.join(wrong)}")
    for name, value in tensors.items():
        own[name].copy_(value)


def names(model: VLPretrainModel) -> dict[str, Tensor]:
    """Parameters and buffers by plain names, sharing memory with the model."""
    return {plain(name): value for name, value in model.state_dict().items()}


def told(missing: list[str], unexpected: list[str]) -> str:
    """Names for an error."""
    parts = ((missing, "missing"), (unexpected, "unexpected"))
    return "; ".join(f"{word} {', '.join(found)}" for found, word in parts if found)


def _differences(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    return [name for name in wanted if name not in got], [name for name in got if name not in wanted]


def _config(found: dict[str, Any]) -> ModelConfig:
    def made(cls: type, values: dict[str, Any]) -> Any:
        lora = values.get("lora")
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**tuples) if lora is None else cls(**{**tuples, "lora": made(LoraConfig, lora)})

    parts = {"image": ImageConfig, "text": TextConfig, "fusion": FusionConfig}
    whole = {name: made(parts[name], value) if name in parts else value for name, value in found.items()}
    config: ModelConfig = made(ModelConfig, whole)
    return config
