"""A short run of HF's `Trainer` on a tiny model made from its config."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from fastvlm_loss.integrations.transformers import patch_transformers

__all__ = ["curve", "run"]

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    **TOWER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40, "max_position_embeddings": 16,
    "projection_size": 16,
}  # fmt: skip


def curve(kind: str, ours: bool, folder: Path) -> list[float]:
    """The loss of every step, of CLIP's or SigLIP's model with the given name of the class."""
    name = kind.removesuffix("Model")
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(
        text_config=TEXT, vision_config={**TOWER, "image_size": 8, "patch_size": 4}, projection_dim=16
    )
    model = getattr(tf, kind)(config).train()
    with patch_transformers(model) if ours else nullcontext():
        return run(model, pairs(64), folder)[0]


def pairs(count: int) -> dict[str, Tensor]:
    """Pictures whose brightness their texts tell."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 39, (count, 6), generator=g)
    tokens[:, -1] = 2
    pictures = torch.randn(count, 3, 8, 8, generator=g) + tokens[:, 0].view(-1, 1, 1, 1) / 10
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pictures}


def run(model: Any, given: dict[str, Tensor], folder: Path, steps: int = 20) -> tuple[list[float], Any]:
    """Losses of a short run, and what the evaluation after it found."""
    count = len(given["input_ids"])
    rows = [{name: values[i] for name, values in given.items()} for i in range(count)]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {**{name: torch.stack([row[name] for row in batch]) for name in given}, "return_loss": True}

    options = tf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, seed=3, disable_tqdm=True,
        dataloader_num_workers=0,
    )  # fmt: skip
    trainer = tf.Trainer(model, options, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.predict(rows)
