"""Weights that others trained, from local files: image towers of timm and open_clip, a BERT of transformers."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .image import ImportedTower
from .model import VLPretrainModel
from .storage import fill, names, plain, told

__all__ = ["Loaded", "load_image_weights", "load_text_weights", "read"]

BERT_FILES = ("model.safetensors", "pytorch_model.bin")
# what a saved BERT holds beside what is used here: of the sentence pairs, and the tied product with the embeddings
BERT_UNUSED = re.compile(r"pooler\.|cls\.seq_relationship\.|cls\.predictions\.decoder\.|embeddings\.position_ids$")
BERT_HEAD = "cls.predictions."


class Loaded(NamedTuple):
    """What did not find its counterpart, and may.

    Attributes:
        new: parameters of the model that stay as they were.
        unused: tensors of the file that the model has no place for.
    """

    new: tuple[str, ...]
    unused: tuple[str, ...]


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of `torch.save`, by plain names; no code of the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, wanted a file of weights")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        found: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: unreadable, wanted safetensors or a state dict of torch.save: {error}") from error
    for inside in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(inside), Mapping):
            found = found[inside]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: got {type(found).__name__} of more than tensors, wanted a state dict")
    return {plain(name): value for name, value in found.items()}


def load_image_weights(model: VLPretrainModel, path: str | Path) -> Loaded:
    """Fill the image tower from the file of a timm model, of an open_clip model (of which only the image tower is
    taken), or from a `model.safetensors` of this library. Position tables are resampled to the size of the pictures.

    Raises:
        FileNotFoundError, ValueError: an unreadable file; parameters that are missing, unexpected (other than a
            classifier) or of another shape, all named. The model is then unchanged.
    """
    path, found, tower = Path(path), read(Path(path)), model.image
    own = {name: value for name, value in names(model).items() if name.startswith("image.")}
    inside = "image.trunk." if isinstance(tower, ImportedTower) else "image."
    prefix = next((p for p in ("image.", "visual.") if any(name.startswith(p) for name in found)), "")
    got = {(prefix if prefix == "image." else inside) + name.removeprefix(prefix): value
           for name, value in found.items() if name.startswith(prefix)}  # fmt: skip
    unused = [name for name in found if not name.startswith(prefix)]
    classifier = tower.classifier if isinstance(tower, ImportedTower) else ()
    for name in [name for name in got if name not in own and name.startswith(tuple(inside + c for c in classifier))]:
        unused.append(name.removeprefix(inside))
        del got[name]
    missing, unexpected = [n for n in own if n not in got], [n for n in got if n not in own]
    if missing or unexpected:
        raise ValueError(f"{path}: {told(missing, unexpected)}")
    if isinstance(tower, ImportedTower):
        for name, value in got.items():
            if name.endswith(("pos_embed", "positional_embedding")):
                got[name] = tower.resampled(value, own[name])
    fill(model, got, str(path))
    return Loaded((), tuple(unused))


def load_text_weights(model: VLPretrainModel, folder: str | Path) -> Loaded:
    """Fill the text tower, the fusion encoder and the head of masked words from a BERT that transformers saved.

    Its first layers become those of the text tower, the next ones those of the fusion encoder, whose cross-attention
    stays new. Of its position table the first `text.positions` rows are taken.

    Raises:
        FileNotFoundError, ValueError: an unreadable file; sizes in its `config.json` that differ; parameters that are
            missing, unexpected or of another shape, all named. The model is then unchanged.

    Source: Li et al. 2021 (ALBEF), section 3.1.
    """
    folder = Path(folder)
    _compare(model, folder / "config.json")
    path = next((folder / name for name in BERT_FILES if (folder / name).is_file()), folder / BERT_FILES[0])
    found = read(path)
    layers, depth = model.config.text.layers, model.config.text.layers + model.config.fusion.layers
    got, unused, unexpected = {}, [], []
    own = {name: value for name, value in names(model).items() if _texts(name)}
    for name, value in found.items():
        place = _place(name, layers)
        layer = re.match(r"(?:bert\.)?encoder\.layer\.(\d+)\.", name)
        if BERT_UNUSED.match(name.removeprefix("bert.")) or (layer and int(layer[1]) >= depth):
            unused.append(name)
        elif place in own:
            got[place] = value
        else:
            unexpected.append(name)
    table = "text.embeddings.position_embeddings.weight"
    if table in got:
        got[table] = got[table][: model.config.text.positions]
    new = [name for name in own if name not in got]
    head = any(name.startswith(BERT_HEAD) for name in found)
    missing = [name for name in new if ".crossattention." not in name and (head or not name.startswith("heads."))]
    if missing or unexpected:
        raise ValueError(f"{path}: {told(missing, unexpected)}")
    fill(model, got, str(path))
    return Loaded(tuple(new), tuple(unused))


def _texts(name: str) -> bool:
    return name.startswith(("text.", "fusion.", "heads.words.")) and "lora_" not in name


def _place(name: str, layers: int) -> str:
    """BERT's name as that of the model; the oldest files call a normalisation's parameters gamma and beta."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
    if layer and int(layer[1]) >= layers:
        return f"fusion.layer.{int(layer[1]) - layers}.{layer[2]}"
    return f"heads.words.{name.removeprefix(BERT_HEAD)}" if name.startswith(BERT_HEAD) else f"text.{name}"


def _compare(model: VLPretrainModel, path: Path) -> None:
    """Heads and activation leave no trace in the shapes: a wrong one would load, and compute something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, wanted the configuration of a BERT that transformers saved")
    got, text = json.loads(path.read_text()), model.config.text
    wanted = {
        "model_type": "bert", "hidden_size": text.width, "num_attention_heads": text.heads,
        "intermediate_size": text.inner, "hidden_act": "gelu",
    }  # fmt: skip
    wrong = [f"{name} {got.get(name)!r} for {value!r}" for name, value in wanted.items() if got.get(name) != value]
    if wrong:
        raise ValueError(f"{path}: got other sizes than the model has: {', '.join(wrong)}")
