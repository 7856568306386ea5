"""One step of training: views of the texts, towers, objectives, one backward, one update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm_loss import cached_step

from .config import Config
from .freezing import learners
from .masking import Masker
from .momentum import Teacher
from .objectives import Batch, Found, Objectives
from .optimizer import Learning, clip
from .parallel import settle, touched, unwrapped
from .stages import Stage
from .views import views_of
from .weighting import Weighting
from .world import World

__all__ = ["Record", "Stepper", "autocast", "logit_scale", "number"]

PATIENCE = 10  # steps in a row that may have a loss or gradient that is not finite


class NotFinite(ValueError):
    """Too many steps in a row gave a loss or a gradient that is not finite."""


@dataclass
class Record:
    """What a step is remembered by; numbers of the whole batch."""

    step: int
    raw: dict[str, float] = field(default_factory=dict)
    weighted: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


class Stepper:
    """Makes steps with the parts that it is given.

    Args:
        model: wrapped for the stage.
        masker: None where nothing is masked.
        teacher: None without a momentum model.
        before: the one of the stage before.
    """

    def __init__(
        self, config: Config, model: nn.Module, learning: Learning, weighting: Weighting, masker: Masker | None,
        teacher: Teacher | None, world: World, pad_id: int, precision: str, before: Stepper | None = None,
    ) -> None:  # fmt: skip
        self.config, self.model, self.learning, self.weighting = config, model, learning, weighting
        self.masker, self.teacher, self.world, self.pad_id, self.precision = masker, teacher, world, pad_id, precision
        self.objectives = Objectives(config, self._call, world, pad_id, teacher)
        self.scaler = torch.amp.GradScaler(world.device.type) if precision == "fp16" else None
        if before is not None and before.scaler is not None:
            self.scaler = before.scaler
        self.failures: int = 0 if before is None else before.failures
        self.counted: dict[str, Tensor] = {} if before is None else before.counted

    def __call__(self, given: Mapping[str, Any], step: int, stage: Stage) -> Record:
        """Train on a batch.

        Raises:
            NotFinite: the tenth step in a row whose loss or gradient is not finite.
        """
        batch = moved(given, self.world.device)
        weights = stage.weights(step)
        tasks = [task for task in weights if task != "vqa" or batch.get("question") is not None]
        masked = self.masker(batch["text"], batch["index"], step) if self.masker and "mlm" in tasks else None
        views = views_of(batch, tasks, masked, self.pad_id, self.world)
        known = Batch(batch["ids"], views, batch.get("question"), batch.get("relevance"))
        factors = self.weighting.factors(tasks, step / self.config.steps)
        rows = self.config.micro_batch or len(known.ids)
        made: dict[str, Any] = {"ids": known.ids}

        def loss(image: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> Tensor:
            raw, made["found"] = self._losses(image, text, known, tasks, step)
            made["raw"] = raw
            terms = {task: weights[task] * factors[task] * raw[task] for task in raw}
            if self.config.weighting.kind == "gradnorm":
                made["norms"] = _norms(terms, image, text)
            total = torch.stack([*terms.values()]).sum()
            more = self.weighting.regularizer(tasks)
            return touched(total if more is None else total + more, self.model)

        # what dropout draws depends on the step and the process alone
        torch.manual_seed(number(self.config.seed, step, self.world.rank, "dropout"))
        with autocast(self.world.device, self.precision):
            if self.teacher is not None:
                tokens, mask = (views.inputs[name][:, 0] for name in ("tokens", "mask"))
                self.teacher.look(batch["images"], tokens, mask, rows)
            cached_step(
                self._encode_image, self._encode_text, batch["images"], views.inputs, loss,
                micro_batch=self.config.micro_batch or None, modules=[self.model], backward=self._backward,
            )  # fmt: skip
        if set(tasks) != set(stage.tasks):  # what is not reached is not moved: DDP made gradients of 0
            for p in set(self.model.parameters()) - learners(unwrapped(self.model), stage, tasks):
                p.grad = None
        return self._finish(step, made, weights, factors)

    def _losses(
        self, image: Mapping[str, Tensor], text: Mapping[str, Tensor], known: Batch, tasks: list[str], step: int
    ) -> tuple[dict[str, Tensor], Found]:
        model, hardness = unwrapped(self.model), self.hardness(step)
        return self.objectives(
            image, text, known, tasks, step, hardness, model.vocabulary(), model.log_scale.exp(), model.logit_bias
        )

    def hardness(self, step: int) -> float:
        """Of the negatives that a step draws: on a line over the run, or uniform draws."""
        first, last = (0.0, 0.0) if self.config.itm.random else self.config.itm.hardness
        return first + (last - first) * step / max(1, self.config.steps - 1)

    def _finish(
        self, step: int, made: Mapping[str, Any], weights: Mapping[str, float], factors: Mapping[str, Tensor]
    ) -> Record:
        """Update where all is finite, and remember."""
        optimizer, model = self.learning.optimizer, unwrapped(self.model)
        assert optimizer is not None
        settle(self.model)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        for p in self.weighting.parameters():
            if p.grad is not None:
                p.grad = self.world.mean(p.grad)
        norm = clip(self.model.parameters(), self.config.optimizer.clip)
        found: Found = made["found"]
        self.counted = {task: weights[task] * factors[task].detach() for task in made["raw"]}
        weighted = {f"weighted {task}": weights[task] * factors[task] * raw for task, raw in made["raw"].items()}
        whole = {**found.metrics, "gradient_norm": norm, "logit_scale": logit_scale(model)}
        told = {**made["raw"], **weighted, **whole}
        mean = self.world.mean(torch.stack([value.detach().float() for value in told.values()]))
        values = dict(zip(told, mean.tolist(), strict=True))
        raw = {task: values.pop(task) for task in made["raw"]}
        record = Record(step, raw, {task: values.pop(f"weighted {task}") for task in raw}, values)
        sound = all(map(math.isfinite, (*raw.values(), values["gradient_norm"])))
        if sound:
            values["learning_rate"] = self.learning.step(step, self.scaler)
            model.clamp_logit_scale()
            self._remember(dict(zip(raw, mean, strict=False)), made, step)
        else:
            record.skipped = True
            self._failed(record)
        if self.scaler is not None:
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.failures = 0 if sound else self.failures
        return record

    def _remember(self, raw: Mapping[str, Tensor], made: Mapping[str, Any], step: int) -> None:
        """What later steps depend on, the same in every process."""
        found = made["found"]
        self.weighting.observe(raw)
        if "norms" in made:
            self.weighting.rebalance({task: self.world.mean(norm) for task, norm in made["norms"].items()})
        if self.masker is not None and found.masked_difference is not None:
            self.masker.observe(*(self.world.collect_any(t) for t in found.masked_difference))
        if self.teacher is not None:
            self.teacher.follow(unwrapped(self.model), made["ids"], step, self.world.group)

    def _failed(self, record: Record) -> None:
        self.failures += 1
        if self.failures >= PATIENCE:
            losses = ", ".join(f"{task} {value:g}" for task, value in record.raw.items())
            raise NotFinite(
                f"step {record.step}: got {PATIENCE} steps in a row with a loss or a gradient that is not finite "
                f"({losses}, gradient norm {record.metrics['gradient_norm']:g}), wanted finite ones: "
                f"optimizer.lr is {self.config.optimizer.lr:g}, try less"
            )

    def _encode_image(self, images: Tensor) -> Any:
        return self.model("image", images)

    def _encode_text(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All views in one call, one below the other."""
        flat = {name: value.flatten(0, 1) for name, value in given.items()}
        made = self.model("text", flat["tokens"], flat["mask"], flat["prefix"])
        return {name: value.unflatten(0, given["prefix"].shape) for name, value in made.items()}

    def _call(self, *args: Any) -> Any:
        return self.model(*args)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The precision of products."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, kinds.get(precision, torch.bfloat16), enabled=precision in kinds)


def number(seed: int, step: int, rank: int, purpose: str) -> int:
    """A seed for one purpose at one step in one process."""
    text = f"{seed}/{step}/{rank}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    return batch


def _norms(terms: Mapping[str, Tensor], image: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the gradients that the objectives have of what the towers give."""
    shared = [t for t in (*image.values(), *text.values()) if t.requires_grad]
    norms = {}
    for task, term in terms.items():
        gradients = torch.autograd.grad(term, shared, retain_graph=True, allow_unused=True)
        norms[task] = torch.stack([g.detach().float().norm() for g in gradients if g is not None]).norm()
    return norms


def logit_scale(model: Callable[..., Any]) -> Tensor:
    """The temperature's inverse `[]` of a model, gathered where it is in shards."""
    p: Tensor = unwrapped(model).log_scale.detach()
    whole: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return whole.exp()
