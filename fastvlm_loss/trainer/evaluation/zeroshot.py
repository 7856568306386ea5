"""Classification by prompts: which colour and which shape a picture of one thing has, by the nearest class's texts."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from ...data.shapes_scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing
from ..data.config import DataConfig
from .held import Held, encode_texts

__all__ = ["zeroshot"]


def zeroshot(held: Held, data: DataConfig) -> dict[str, float]:
    """Accuracy of colour, of shape, and the mean of both, on shapes of one object; nothing where there are none.

    A class is the mean of the features of all captions of one object that name it (Radford et al. 2021, section 3.1.4).
    """
    alone = [i for i, sample in enumerate(held.samples) if _one_shape(data, sample.index, sample.objects)]
    if not alone:
        return {}
    scenes = [Scene((Thing(*words),), None, ground) for *words, ground in product(SIZES, COLOURS, SHAPES, BACKGROUNDS)]
    batch = held.collate.text([s.caption for s in scenes], [held.samples[alone[0]]] * len(scenes))
    prompts = encode_texts(held.model, batch["tokens"], batch["mask"], held.device).features.float()
    pictures = held.features[torch.tensor(alone, device=held.device)].float()
    found = {}
    for name, classes, at in (("colour", COLOURS, 1), ("shape", SHAPES, 2)):
        which = torch.tensor([classes.index(scene.things[0][at]) for scene in scenes], device=held.device)
        means = torch.stack([prompts[which == k].mean(0) for k in range(len(classes))])
        nearest = (pictures @ F.normalize(means, dim=1).T).argmax(1).tolist()
        words = [held.samples[i].caption.split() for i in alone]
        right = [classes[k] in said for k, said in zip(nearest, words, strict=True)]
        found[f"zeroshot/{name}"] = 100 * sum(right) / len(right)
    chance = 50 / len(COLOURS) + 50 / len(SHAPES)
    return {"zeroshot/accuracy": sum(found.values()) / len(found), **found, "zeroshot/chance": chance}


def _one_shape(data: DataConfig, index: int, objects: tuple[str, ...]) -> bool:
    source = index >> 40
    return len(objects) == 1 and source < len(data.sources) and data.sources[source].path == "shapes"
