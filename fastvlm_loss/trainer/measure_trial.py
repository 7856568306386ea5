"""The configurations that `measure` compares, and a training step in one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .build import masker_of, model_of, teacher_of
from .config import Config, StageConfig
from .data import Data, Loader
from .freezing import freeze
from .model import VLPretrainModel
from .optimizer import Learning
from .stages import GROUPS, Stage, stages_of
from .step import Stepper
from .weighting import Weighting
from .world import World

__all__ = ["ROWS", "Row", "Trial"]

TOWERS = ("vision", "text")


@dataclass(frozen=True)
class Row:
    """A configuration; what it does not say is as configured, but in fp32 and without checkpointing.

    Args:
        name: as the table calls it.
        frozen: both towers; projections, fusion encoder and heads learn.
        prefix: the towers run under `no_grad` besides.
        checkpointing: recompute activations in backward.
        precision: `fp32`, `bf16` (autocast), or `pure`: weights, gradients and moments of bf16 too (the temperature
            stays fp32).
    """

    name: str
    frozen: bool = False
    prefix: bool = False
    checkpointing: bool = False
    precision: str = "fp32"

    def of(self, config: Config) -> tuple[Config, Stage]:
        """The configuration, and its last stage as the only one."""
        last = stages_of(config)[-1]
        learn = tuple(group for group in last.train if not (self.frozen and group in TOWERS))
        stage = StageConfig("measured", 1.0, {**last.weights(last.end - 1)}, learn or GROUPS)
        precision: Any = "bf16" if self.precision == "bf16" else "fp32"
        changed = replace(
            config, stages=(stage,), checkpointing=self.checkpointing, precision=precision, grad_scaler=None
        )
        return changed, stages_of(changed)[0]


ROWS = (
    Row("all trainable"),
    Row("towers frozen", frozen=True),
    Row("towers frozen, under no_grad", frozen=True, prefix=True),
    Row("checkpointing", checkpointing=True),
    Row("bf16 autocast", precision="bf16"),
    Row("pure bf16", precision="pure"),
    Row("frozen, checkpointing, bf16 autocast", frozen=True, checkpointing=True, precision="bf16"),
)


class Trial:
    """A model and its optimiser, about to take the same step over and over."""

    def __init__(self, row: Row, config: Config, data: Data, world: World) -> None:
        changed, self.stage = row.of(config)
        self.model = model = model_of(changed, data, None).to(world.device)
        teacher = teacher_of(changed, model, world)
        if row.prefix:
            _without_graph(model)
        if row.precision == "pure":
            model.to(torch.bfloat16)
            model.temperature.float()
        freeze(model, self.stage)
        weighting = Weighting(changed.weighting, self.stage.tasks).to(world.device)
        self.learning = Learning(changed.optimizer, changed.steps, world.device)
        extra = ((f"weighting.{name}", p) for name, p in weighting.named_parameters())
        self.learning.begin(self.stage, [*model.named_parameters(), *extra])
        masker = masker_of(changed, data.tokenizer, [self.stage])
        self.stepper = Stepper(
            changed, model, self.learning, weighting, masker, teacher, world, data.tokenizer.pad_id, changed.precision
        )
        self.batch = next(iter(Loader(data, changed.batch_size)))

    def __call__(self, step: int = 0) -> None:
        """One step, update included."""
        if self.stepper(self.batch, step, self.stage).skipped:
            raise ValueError("precision: got a loss or a gradient that is not finite, wanted a step to measure")

    def prime(self) -> None:
        """Allocate the optimiser's state by an update with gradients of 0."""
        optimizer = self.learning.optimizer
        assert optimizer is not None
        for p in self.learning.named.values():
            p.grad = torch.zeros_like(p)
        self.learning.step(0)
        optimizer.zero_grad(set_to_none=True)

    def sizes(self) -> dict[str, int]:
        """Bytes that do not depend on the batch; how many numbers learn, and of how many."""
        state = [t for tensors in self.learning.state.values() for t in tensors.values()]
        learn = [*self.learning.named.values()]
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "learn": sum(p.numel() for p in learn),
            "weights": _bytes([*self.model.parameters(), *self.model.buffers()]),
            "gradients": _bytes(learn),
            "optimizer": _bytes(state),
        }


def _without_graph(model: VLPretrainModel) -> None:
    for tower in (model.image, model.text):
        tower.forward = torch.no_grad()(tower.forward)  # type: ignore[method-assign]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
