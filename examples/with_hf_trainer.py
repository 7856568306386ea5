"""CLIP with the Trainer of Hugging Face transformers: its loop, our loss, and the gradient of the whole batch.

    pip install "transformers[torch]"                                # brings accelerate
    python examples/with_hf_trainer.py
    python examples/with_hf_trainer.py --micro-batch 16              # less memory, the same gradient
    torchrun --nproc-per-node 2 examples/with_hf_trainer.py --cpu

What a Trainer for language models does otherwise is marked below. The pairs are made up.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastvlm_loss import CLIPLoss, cached_step

PIXELS, DIM, BATCH, HELD = 48, 32, 64, 256


class Towers(nn.Module):
    """An image and a text tower, and the scale of their scores.

    1. One `forward` for everything: autocast and DDP's hooks are around `forward` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(PIXELS, 64), nn.GELU(), nn.Linear(64, DIM)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, part: str, inputs: Tensor | None = None) -> Tensor:
        """`image` or `text`: features `[B, DIM]`; `scale`: that of the scores, `[1]`."""
        if inputs is None:
            return self.log_scale.exp()
        tower = self.image if part == "image" else self.text
        return nn.functional.normalize(tower(inputs).float(), dim=1)


class Pairs(Dataset[dict[str, Tensor]]):
    """Made-up pairs: a text is a turned image with noise."""

    def __init__(self, count: int, seed: int) -> None:
        turn = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))).Q
        g = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, PIXELS, generator=g)
        self.texts = self.images @ turn + 0.3 * torch.randn(count, PIXELS, generator=g)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"images": self.images[k], "texts": self.texts[k]}


class ContrastiveTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A Trainer whose step is that of a whole batch."""

    def __init__(self, *args: Any, micro_batch: int | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        # 2. Accumulation would average losses of small batches, which have other negatives: another objective.
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps: wanted 1; for a larger batch give micro_batch")
        self.contrast, self.micro_batch = CLIPLoss(), micro_batch

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the batch, that of all processes together."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        group = dist.group.WORLD if dist.is_initialized() else None

        def loss(image: Tensor, text: Tensor) -> Tensor:
            value: Tensor = self.contrast(image, text, model("scale"), group=group)
            return value

        return cached_step(
            partial(model, "image"), partial(model, "text"), inputs["images"], inputs["texts"], loss,
            micro_batch=self.micro_batch, modules=[model], backward=self.accelerator.backward,
        )  # fmt: skip

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """3. The Trainer would decay the temperature too, which is neither a bias nor a norm."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]


class Clamp(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """4. The scale stays below 100, by a clamp after the update: one in `forward` would stop the gradient."""

    def on_step_end(self, *_: Any, model: Towers, **__: Any) -> None:
        """After each update."""
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(100))


def retrieved(model: Towers, pairs: Pairs) -> float:
    """Share of the images whose own text is the best of all."""
    given, device = {"image": pairs.images, "text": pairs.texts}, model.log_scale.device
    with torch.no_grad():
        image, text = (model(part, inputs.to(device)) for part, inputs in given.items())
    right = (image @ text.T).argmax(1) == torch.arange(len(image), device=device)
    return float(right.float().mean())


def main() -> None:
    """Train, and print the losses and what the model retrieves among held-out pairs."""
    parser = argparse.ArgumentParser(description="CLIP with the Trainer of transformers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--micro-batch", type=int, help="pairs of a forward pass; all by default")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model, held = Towers(), Pairs(HELD, 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=asked.steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, use_cpu=asked.cpu,
            dataloader_drop_last=True,  # 5. a smaller last batch would have fewer negatives
            remove_unused_columns=False,  # 6. or "images" and "texts", no arguments of `forward`, would be dropped
            logging_steps=10, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = ContrastiveTrainer(
            model, arguments, train_dataset=Pairs(10 * BATCH, 1), callbacks=[Clamp()], micro_batch=asked.micro_batch
        )
        before = retrieved(model, held)
        trainer.train()
        if trainer.is_world_process_zero():
            losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            print("mean losses of ten steps:", " ".join(f"{float(loss):.4f}" for loss in losses))
            print(f"right text first of {HELD}: {before:.0%} before, {retrieved(model, held):.0%} after")


if __name__ == "__main__":
    main()
