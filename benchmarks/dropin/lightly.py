"""A small SimCLR, or with a memory bank a small MoCo, on random views: the loop that lightly's tutorials write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightly.loss as theirs
import torch

from fastvlm_loss.integrations import lightly as replaced

__all__ = ["curve", "trained"]


def curve(kind: str, ours: bool, folder: Path) -> list[float]:
    """The loss of every step, of the loss of that name."""
    return trained(getattr(replaced if ours else theirs, kind), 0)


def trained(kind: Any, size: int | tuple[int, int]) -> list[float]:
    """Losses of 20 steps with a bank of that size, one seed; in fp64, where training magnifies no rounding."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 16)
    model = torch.nn.Sequential(*layers).double()
    loss, data = kind(0.2, size).double(), torch.randn(20, 24, 20).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    losses = []
    for batch in data:
        noisy = [batch + 0.3 * torch.randn_like(batch) for _ in range(2)]
        value = loss(*map(model, noisy))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
