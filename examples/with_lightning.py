"""CLIP with Lightning: the losses are functions of features, so `training_step` stays as it is.

    pip install lightning
    python examples/with_lightning.py                               # --precision bf16-mixed: autocast
    python examples/with_lightning.py --cpu --devices 2             # two processes, one batch
    python examples/with_lightning.py --cpu --devices 2 --check     # how far the curve is from that of a plain loop
    python examples/with_lightning.py --cpu --micro-batch 16        # the same batch in less memory

Six things differ from a module for classification, and are marked below. The pairs are made up.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastvlm_loss import cached_step, clip_loss

PIXELS, DIM, BATCH = 48, 32, 64


class Contrastive(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
    """An image and a text tower, the scale of their scores, and their loss."""

    def __init__(self, steps: int, micro_batch: int | None = None) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(PIXELS, 64), nn.GELU(), nn.Linear(64, DIM)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.steps, self.micro_batch, self.curve = steps, micro_batch, list[float]()
        self.automatic_optimization = micro_batch is None

    def forward(self, part: str, inputs: Tensor | None = None) -> Tensor:
        """`image` or `text`: features `[B, DIM]`; `scale`: that of the scores, `[1]`."""
        if inputs is None:
            return self.log_scale.exp()
        tower = self.image if part == "image" else self.text
        return nn.functional.normalize(tower(inputs).float(), dim=1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of the batch, which is that of all processes."""
        images, texts = batch
        # 1. In several processes `group=` makes the negatives those of all; DDP's mean is then the whole batch's
        # gradient. Autocast and DDP's hooks are around `training_step`, which may call any part of the module.
        group = dist.group.WORLD if dist.is_initialized() else None
        if self.micro_batch is None:
            loss = clip_loss(self("image", images), self("text", texts), self("scale"), group=group)
        else:
            loss = self.cached(images, texts, self.micro_batch, group)
        # 2. It is the same number in all processes: `self.log` needs no `sync_dist`.
        self.log("loss", loss)
        self.curve.append(loss.item())
        return loss

    def cached(self, images: Tensor, texts: Tensor, micro_batch: int, group: dist.ProcessGroup | None) -> Tensor:
        """A whole step, from micro-batches."""
        # 3. Not `accumulate_grad_batches`: the mean of the losses of small batches has other negatives, so it is
        # another objective, and a weaker one. `cached_step` makes the gradient of the whole batch, and reduces it once:
        # it and the encoders are given what Lightning has wrapped, and backward is not `manual_backward`, which
        # prepares DDP for a single one.
        model: nn.Module = self.trainer.strategy.model
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = cached_step(
            partial(model, "image"), partial(model, "text"), images, texts,
            lambda image, text: clip_loss(image, text, model("scale"), group=group),
            micro_batch=micro_batch, modules=[model],
        )  # fmt: skip
        optimizer.step()
        self.lr_schedulers().step()
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Bound the scale."""
        # 4. After the update: a clamp in `forward` would stop the gradient.
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(100))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, no decay of biases and of the temperature, and a schedule in steps."""
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        # 5. Lightning steps a scheduler once an epoch unless told otherwise.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pairs(count: int) -> TensorDataset:
    """Made-up pairs: a text is a turned image with noise."""
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=g)).Q
    images = torch.randn(count, PIXELS, generator=g)
    return TensorDataset(images, images @ turn + 0.3 * torch.randn(count, PIXELS, generator=g))


def batches(devices: int, rank: int) -> DataLoader[tuple[Tensor, ...]]:
    """A process's shares of the batches; the order of the pairs is the same for any number of processes."""
    data = pairs(10 * BATCH)
    # 6. Of a process `batch_size` is its share. A smaller last batch would have fewer negatives.
    return DataLoader(data, BATCH // devices, sampler=DistributedSampler(data, devices, rank), drop_last=True)


def train(steps: int, micro_batch: int | None, precision: str, cpu: bool, devices: int) -> list[float] | None:
    """The loss of every step, or None in all processes but the first."""
    torch.manual_seed(0)
    model = Contrastive(steps, micro_batch)
    trainer = lightning.Trainer(
        accelerator="cpu" if cpu else "auto", devices=devices, strategy="ddp" if devices > 1 else "auto",
        precision=precision, max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = batches(devices, trainer.global_rank)
    trainer.fit(model, loader)
    return model.curve if trainer.is_global_zero else None


def plain(steps: int) -> list[float]:
    """The same of a loop in one process, which has the whole batch."""
    torch.manual_seed(0)
    model = Contrastive(steps)
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(schedule, dict)
    loader, curve = batches(1, 0), list[float]()
    while len(curve) < steps:
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.set_epoch(len(curve) // len(loader))  # another order in each, as Lightning has it
        for images, texts in loader:
            loss = clip_loss(model("image", images), model("text", texts), model("scale"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule["scheduler"].step()
            model.on_train_batch_end()
            curve.append(loss.item())
    return curve[:steps]


def main() -> None:
    """Train, and print the loss of every tenth step."""
    parser = argparse.ArgumentParser(description="CLIP with Lightning")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--micro-batch", type=int, help="pairs of a process for whose activations there is room")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--devices", type=int, default=1, help="processes, which Lightning starts; they divide 64")
    parser.add_argument("--check", action="store_true", help="compare with a plain loop in one process")
    asked = parser.parse_args()
    curve = train(asked.steps, asked.micro_batch, asked.precision, asked.cpu, asked.devices)
    if curve is None:
        return
    for step, loss in enumerate(curve):
        if step % 10 == 0 or step == asked.steps - 1:
            print(f"step {step}: loss of the whole batch {loss:.4f}", flush=True)
    if asked.check:
        apart = max(abs(a - b) for a, b in zip(curve, plain(asked.steps), strict=True))
        print(f"largest distance from a plain loop: {apart:.1e}")


if __name__ == "__main__":
    main()
