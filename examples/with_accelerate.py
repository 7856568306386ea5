"""CLIP with Hugging Face Accelerate: the losses are functions of features, so its loop stays as it is.

    pip install accelerate
    python examples/with_accelerate.py                               # --precision bf16: autocast
    python examples/with_accelerate.py --check                       # gradients: a batch, micro-batches, accumulation
    torchrun --nproc-per-node 2 examples/with_accelerate.py --cpu    # `accelerate launch --cpu` would start one process

Five things differ from a loop for classification, and are marked below. The pairs are made up.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvlm_loss import cached_step, clip_loss

PIXELS, DIM, BATCH, MICRO_BATCH = 48, 32, 64, 16


class Towers(nn.Module):
    """An image and a text tower, and the scale of their scores.

    1. One `forward` for everything. Accelerate puts autocast and DDP's hooks around `forward` alone: what is called
    past it, `model.image(images)` say, runs in fp32, and its gradients are not reduced.
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


def pairs(count: int) -> TensorDataset:
    """Made-up pairs: a text is a turned image with noise."""
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=g)).Q
    images = torch.randn(count, PIXELS, generator=g)
    return TensorDataset(images, images @ turn + 0.3 * torch.randn(count, PIXELS, generator=g))


def step(
    model: nn.Module, images: Tensor, texts: Tensor, micro_batch: int, backward: Callable[[Tensor], object]
) -> Tensor:  # fmt: skip
    """Gradients of one batch, which is that of all processes."""
    # 2. In several processes `group=` makes the negatives those of all; DDP's mean is then the whole batch's gradient.
    group = dist.group.WORLD if dist.is_initialized() else None

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, model("scale"), group=group)

    # 3. Not `accelerator.accumulate`: the mean of the losses of small batches has other negatives, so it is another
    # objective, and a weaker one. `cached_step` makes the gradient of the whole batch from micro-batches, and reduces
    # it once.
    return cached_step(
        partial(model, "image"), partial(model, "text"), images, texts, loss,
        micro_batch=micro_batch, modules=[model], backward=backward,
    )  # fmt: skip


def train(steps: int, precision: str, cpu: bool) -> None:
    """Train, and print the loss of every tenth step."""
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    torch.manual_seed(0)
    model = Towers()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # biases, and the temperature
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # a smaller last batch would have fewer negatives
    loader = DataLoader(pairs(10 * BATCH), BATCH, shuffle=True, drop_last=True)
    # 4. Not the scheduler: a prepared one makes as many steps at a time as there are processes.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    log_scale = accelerator.unwrap_model(model).log_scale
    done = 0
    while done < steps:
        for images, texts in loader:
            loss = step(model, images, texts, MICRO_BATCH, accelerator.backward)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            # 5. After the update: a clamp in `forward` would stop the gradient.
            with torch.no_grad():
                log_scale.clamp_(0, math.log(100))
            if done % 10 == 0 or done == steps - 1:
                accelerator.print(f"step {done}: loss of the whole batch {loss.item():.4f}")
            done += 1
            if done == steps:
                break
    accelerator.end_training()


def check() -> None:
    """How far the gradients of micro-batches and of accumulation are from those of the batch, relative to its norm."""
    torch.manual_seed(0)
    model, (images, texts) = Towers(), pairs(BATCH).tensors
    parameters = [*model.parameters()]

    def gradient(micro_batch: int, accumulated: bool) -> Tensor:
        model.zero_grad()
        parts = BATCH // micro_batch if accumulated else 1
        for image, text in zip(images.chunk(parts), texts.chunk(parts), strict=True):
            step(model, image, text, micro_batch, lambda loss: (loss / parts).backward())
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    whole = gradient(BATCH, False)
    for name, accumulated in (("micro-batches", False), ("accumulation", True)):
        apart = (gradient(MICRO_BATCH, accumulated) - whole).norm() / whole.norm()
        print(f"{name} of {MICRO_BATCH}: {apart.item():.1e} from the gradient of the batch of {BATCH}")


def main() -> None:
    """Train or compare."""
    parser = argparse.ArgumentParser(description="CLIP with Accelerate")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--check", action="store_true", help="compare gradients instead of training")
    asked = parser.parse_args()
    if asked.check:
        check()
    else:
        train(asked.steps, asked.precision, asked.cpu)


if __name__ == "__main__":
    main()
