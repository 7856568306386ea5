"""A short run of PyTorch Metric Learning's own trainer, `trainers.MetricLossOnly`, on labelled points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.utils.data import TensorDataset

from fastvlm_loss.integrations import metric_learning as replaced

__all__ = ["curve", "trained"]


def curve(kind: str, ours: bool, folder: Path) -> list[float]:
    """The loss of every step, of the loss of that name."""
    return trained(getattr(replaced if ours else theirs, kind)(temperature=0.2), None)


def trained(loss: Any, miner: Any, steps: int = 20) -> list[float]:
    """Losses of a run, one seed; in fp64, where training magnifies no rounding."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)).double()
    labels = torch.randint(10, (40 * steps,))
    points = torch.randn(10, 20)[labels] + 0.5 * torch.randn(len(labels), 20)
    found: list[float] = []
    trainer = MetricLossOnly(
        models={"trunk": model}, optimizers={"trunk_optimizer": torch.optim.SGD(model.parameters(), 0.1)},
        batch_size=40, loss_funcs={"metric_loss": loss}, mining_funcs={"tuple_miner": miner} if miner else {},
        dataset=TensorDataset(points.double(), labels), iterations_per_epoch=steps, dataloader_num_workers=0,
        data_device=torch.device("cpu"), dtype=torch.float64,
        end_of_iteration_hook=lambda run: found.append(run.losses["metric_loss"].item()),
    )  # fmt: skip
    trainer.train(num_epochs=1)
    return found
