"""A short run of open_clip's own training entry point, `open_clip_train.main`, on drawn shapes."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.main import main
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from fastvlm_loss.data import shapes
from fastvlm_loss.integrations.open_clip import patch_open_clip

__all__ = ["KINDS", "curve"]

SIZE = 32
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY = {
    "embed_dim": 32, "text_cfg": TEXT,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
}  # fmt: skip
SIGMOID = {**TINY, "init_logit_bias": -10}
CAPTIONS = {
    **TINY, "custom_text": True, "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "vision_cfg": {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "mlp_ratio": 4, "dim_head": 16, "n_queries": 8},
}  # fmt: skip
# loss -> model, and the options that ask for it
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ClipLoss": ("tiny", TINY, ()),
    "SigLipLoss": ("tiny-sigmoid", SIGMOID, ("--siglip",)),
    "CoCaLoss": ("coca_tiny", CAPTIONS, ("--pretrained",)),
    "DistillClipLoss": ("tiny", TINY, ("--distill-model", "tiny", "--distill-pretrained")),
}


def curve(
    kind: str, ours: bool, folder: Path, steps: int = 8, batch: int = 16, more: Sequence[str] = ()
) -> list[float]:
    """The loss of every call in a training run.

    Args:
        kind: of `KINDS`.
        ours: whether open_clip is patched.
        folder: for the data, the model's configuration and the logs of the run.
        more: further options of open_clip.
    """
    name, config, asked = KINDS[kind]
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    if asked and asked[-1].endswith("pretrained"):
        asked = (*asked, str(_weights(name, folder / "weights.pt")))
    losses: list[float] = []

    def keep(module: torch.nn.Module, given: Any, made: Any) -> None:
        if isinstance(module, (open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss)) and isinstance(made, dict):
            losses.append(float(sum(value.detach() for value in made.values())))

    hook = register_module_forward_hook(keep)
    level = logging.root.level
    try:
        with patch_open_clip() if ours else nullcontext():
            main(
                [
                    "--model", name, "--train-data", str(_table(folder, steps * batch)), "--dataset-type", "csv",
                    "--csv-separator", ",", "--workers", "0", "--batch-size", str(batch), "--epochs", "1",
                    "--lr", "1e-3", "--warmup", "1", "--precision", "fp32", "--device", "cpu",
                    "--save-frequency", "0", "--seed", "0",
                    "--logs", str(folder / "logs"), "--name", f"{kind}-{ours}-{len(list(folder.glob('logs/*')))}",
                    *asked, *more,
                ]
            )  # fmt: skip
    finally:
        hook.remove()
        logging.root.setLevel(level)
    return losses


def _weights(name: str, path: Path) -> Path:
    """Of a new model; CoCa's of open_clip 3.3 leaves one of them as it found the memory."""
    torch.manual_seed(1)
    state = open_clip.create_model(name).state_dict()
    if "text_decoder.text_projection" in state:
        torch.nn.init.normal_(state["text_decoder.text_projection"], std=0.1)
    torch.save(state, path)
    return path


def _table(folder: Path, count: int) -> Path:
    """Pictures and captions as open_clip's csv."""
    path = folder / f"pairs-{count}.csv"
    if path.exists():
        return path
    pairs = shapes.load(train=count, test=1, size=SIZE).train
    rows = [("filepath", "title")]
    for i, pixels in enumerate(pairs.images[torch.arange(count)].numpy()):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((str(folder / f"{i}.png"), pairs.captions[i]))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
