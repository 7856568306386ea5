"""CLIP over several processes: each has its share of the batch, the loss is that of the whole.

    torchrun --nproc-per-node 4 examples/distributed_step.py            # CPU processes; on GPUs the same line, one each
    torchrun --nproc-per-node 4 examples/distributed_step.py --check    # and compares with one process

Under DDP nothing else is needed: its mean of the gradients is that of the whole batch.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvlm_loss import clip_loss

DIM, PAIRS = 32, 96


class Towers(nn.Module):
    """An image and a text tower, and the scale of their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, DIM)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(14.3).log())

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features, and the scale."""
        image, text = (nn.functional.normalize(t, dim=1) for t in (self.image(images), self.text(texts)))
        return image, text, self.logit_scale.exp()


def pairs(step: int) -> tuple[Tensor, Tensor]:
    """A batch of made-up pairs: a text is a turned image with noise."""
    g = torch.Generator().manual_seed(step)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q
    images = torch.randn(PAIRS, 48, generator=g)
    return images, images @ turn + 0.3 * torch.randn(PAIRS, 48, generator=g)


def main() -> None:
    """Train for some steps, and report from the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--check", action="store_true", help="compare the gradients with those of one process")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    towers = Towers().to(device)
    model = DistributedDataParallel(towers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(asked.steps):
        # the last share may be smaller: shares need not be even
        images, texts = (t.tensor_split(world)[rank].to(device) for t in pairs(step))
        loss = clip_loss(*model(images, texts), group=dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()
        if asked.check and step == 0:
            compare(towers, loss.detach(), [t.to(device) for t in pairs(step)])
        optimizer.step()
        if rank == 0 and step % 20 in (0, 19):
            print(f"step {step}: loss of the whole batch {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


def compare(towers: Towers, loss: Tensor, whole: list[Tensor]) -> None:
    """Raise unless loss and gradients are those of one process with the whole batch."""
    wanted = clip_loss(*towers(*whole))
    parameters = dict(towers.named_parameters())
    gradients = torch.autograd.grad(wanted, tuple(parameters.values()))
    torch.testing.assert_close(loss, wanted.detach())
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name
    if dist.get_rank() == 0:
        print("loss and gradients are those of one process", flush=True)


if __name__ == "__main__":
    main()
