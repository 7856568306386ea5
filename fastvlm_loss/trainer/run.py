"""A run: its parts, its stages, its checkpoints. `Run(config, world).train()` is the whole of it."""

from __future__ import annotations

import dataclasses
import platform
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from .. import __version__
from . import text
from .build import masker_of, model_of, precision_of, teacher_of
from .checkpoint import CheckpointError, Checkpoints, read_state
from .config import Config
from .data import Data, Loader
from .evaluation import Evaluation, evaluate
from .freezing import freeze
from .objectives import contrastive_loss
from .optimizer import Learning
from .parallel import full_state, unwrapped, wrap
from .progress import Log
from .stages import Stage, stages_of
from .step import Stepper
from .weighting import Weighting
from .world import World

__all__ = ["Run"]

# what a resumed run may change: where and how it runs, not what it computes
_FREE = {
    "output", "resume", "device", "threads", "evaluation", "checkpoint", "micro_batch", "compile", "checkpointing",
    "strategy", "tensorboard",
}  # fmt: skip
_FREE_DATA = {"workers", "prefetch", "pin_memory"}


class Run:
    """Everything that a run consists of, from its configuration or from its newest checkpoint.

    Raises:
        ValueError: a configuration that does not go together, named; data that cannot be read.
        CheckpointError: a checkpoint of another configuration, or none that is whole.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.folder = config, world, Path(config.output)
        self.stages = stages_of(config)
        self.precision = precision_of(config, world)
        self.computed = dataclasses.replace(config, precision=self.precision)  # what `auto` is on this device
        contrastive_loss(config)  # what does not go together is said before any work
        self.checkpoints = Checkpoints(self.folder, config.checkpoint.keep, world)
        found, meta = self._resumed()
        self.step, self.best = meta.get("step", 0), meta.get("best")
        vocabulary = None if found is None else text.load(found / "vocabulary.json")
        self.data = Data.open(config.data, config.seed, vocabulary)
        self._check(meta)
        self.tokenizer = self.data.tokenizer
        self.source = model_of(config, self.data, found).to(world.device)
        self.teacher = teacher_of(config, self.source, world)
        self.learning = Learning(config.optimizer, config.steps, world.device)
        self.weighting = Weighting(config.weighting, self.tasks).to(world.device)
        self.masker = masker_of(config, self.tokenizer, self.stages)
        self.stage: Stage | None = None
        self.model: nn.Module = self.source
        self.stepper: Stepper | None = None
        if found is not None:
            self.learning.since = meta["since"]
            self._enter(self._stage_at(self.step - 1))
            self._restore(found, meta)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The objectives of all stages."""
        return tuple(dict.fromkeys(task for stage in self.stages for task in stage.tasks))

    def train(self, stopped: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Train to the end, and evaluate; None where `stopped()` in any process ended it before, after saving."""
        config, world, begun = self.config, self.world, self.step
        with Log(self.folder, config.steps, self.step, config.batch_size, world, config.tensorboard) as log:
            for stage in self.stages[self.stages.index(self._stage_at(min(self.step, config.steps - 1))) :]:
                loader = self._loader(stage)
                for batch in loader:
                    if stage is not self.stage:
                        self._enter(stage)
                    assert self.stepper is not None
                    log.step(self.stepper(batch, self.step, stage), stage.name)
                    self.step += 1
                    ended = world.any(stopped())
                    if self._between(log, ended):
                        return None
                for (source, reason), count in loader.skips.items():
                    log.say(f"stage {stage.name}: skipped {count} of {source}: {reason}")
            result = self._judge(log)
            if self.step > begun:
                self.save()
        return result

    def _loader(self, stage: Stage) -> Loader:
        weights, start = stage.config.sources or None, max(self.step, stage.start)
        batch_size, world = self.config.batch_size, self.world
        return Loader(self.data, batch_size, world.rank, world.size, start, stage.end, weights)

    def _between(self, log: Log, ended: bool) -> bool:
        """Evaluate and save where it is time; whether the run ends here, before its last step."""
        if self.step == self.config.steps:
            return False
        judged, saved = self.config.evaluation.every, self.config.checkpoint.every
        if judged and self.step % judged == 0:
            self._judge(log)
        best = self.best is not None and self.best["step"] == self.step
        if ended or best or (saved and self.step % saved == 0):
            self.save()
        return ended

    def evaluate(self) -> Evaluation:
        """On the held-out pairs, in every process alike.

        Raises:
            CheckpointError: nothing was trained, in this process or before.
        """
        if not self.step:
            raise CheckpointError(f"output: got {self.folder} without a checkpoint, wanted one to evaluate")
        held = self.data.held(self.config.evaluation.limit)
        return evaluate(self.model, self.tokenizer, held, self.config, self.world.device, self.precision, self.tasks)

    def save(self) -> Path:
        """Write a checkpoint, and keep it as the best if it is."""
        weights = full_state(self.model)

        def write(folder: Path) -> None:
            unwrapped(self.source).save(folder, weights)
            text.save(self.tokenizer, folder / "vocabulary.json")

        path = self.checkpoints.save(self.step, self._meta(), write, self._state())
        if self.best is not None and self.best["step"] == self.step:
            self.checkpoints.keep_best(path)
        return path

    def _judge(self, log: Log) -> Evaluation:
        result = self.evaluate()
        log.evaluated(self.step, result.figures)
        name = self.config.checkpoint.best
        value = result.figures.get(name)
        if value is not None:  # one figure in all processes, since saving is for all of them
            value = self.world.mean(torch.tensor(value, dtype=torch.float64, device=self.world.device)).item()
        if value is not None and (self.best is None or self.best["name"] != name or value > self.best["value"]):
            self.best = {"step": self.step, "name": name, "value": value}
        return result

    def _stage_at(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.end)

    def _enter(self, stage: Stage) -> None:
        """Freeze and train what the stage says, and wrap the model for it."""
        config, world = self.config, self.world
        if self.stage is not None and world.size > 1 and config.strategy != "ddp":
            # FSDP fixes what learns when it shards: shard a fresh model
            weights = full_state(self.model)
            self.source = model_of(config, self.data, None).to(world.device)
            freeze(self.source, stage)
            self.model = wrap(self.source, self.source.blocks(), config.strategy, world)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(self.model, dict(weights), options=options)
        else:
            freeze(self.source, stage)
            self.model = wrap(self.source, self.source.blocks(), config.strategy, world)
        named = [
            *self.source.named_parameters(),
            *((f"weighting.{n}", p) for n, p in self.weighting.named_parameters()),
        ]
        self.learning.begin(stage, named)
        self.stage = stage
        self.stepper = Stepper(
            config, self.model, self.learning, self.weighting, self.masker, self.teacher, world,
            self.tokenizer.pad_id, self.precision, self.stepper,
        )  # fmt: skip

    def _state(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint beside the weights."""
        parts = {"weighting": self.weighting, "masker": self.masker}
        found = {f"{n}.{k}": v for n, part in parts.items() if part is not None for k, v in part.state_dict().items()}
        for name, tensors in self.learning.state.items():
            found |= {f"optimizer.{name}.{key}": value for key, value in tensors.items()}
        return found | ({} if self.teacher is None else self.teacher.state())

    def _restore(self, path: Path, meta: dict[str, Any]) -> None:
        """What `_state` gave, into its places; the optimiser's are made like their parameters."""
        there, named = self._state(), self.learning.named

        def wanted(name: str, size: torch.Size) -> Tensor | None:
            if not name.startswith("optimizer."):
                return there.get(name)
            of, _, key = name.removeprefix("optimizer.").rpartition(".")
            if of not in named:
                return None
            p, fused = named[of].detach(), self.learning.fused
            return torch.zeros((), device=p.device if fused else "cpu") if key == "step" else torch.zeros_like(p)

        state = read_state(path, wanted, self.world)
        missing = sorted(set(there) - set(state))
        if missing:
            raise CheckpointError(f"checkpoint {path.name}: got no {missing[0]}, wanted all of {len(there)} tensors")
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                of, _, key = name.removeprefix("optimizer.").rpartition(".")
                optimizer.setdefault(of, {})[key] = value
            else:
                with torch.no_grad():
                    there[name].copy_(value)
        self.learning.restore(optimizer)
        assert self.stepper is not None
        self.stepper.failures = meta["failures"]
        if self.stepper.scaler is not None and meta["scaler"]:
            self.stepper.scaler.load_state_dict(meta["scaler"])

    def _meta(self) -> dict[str, Any]:
        assert self.stepper is not None and self.stage is not None
        scaler = self.stepper.scaler
        return {
            "format": 1,
            "samples": self.step * self.config.batch_size,
            "stage": self.stage.name,
            "seed": self.config.seed,
            "world_size": self.world.size,
            "hardness": self.stepper.hardness(self.step - 1),
            "weights": {task: value.item() for task, value in self.stepper.counted.items()},
            "best": self.best,
            "since": self.learning.since,
            "failures": self.stepper.failures,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": self._fingerprint(),
            "config": dataclasses.asdict(self.computed),
            "versions": {"fastvlm_loss": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _fingerprint(self) -> int:
        """A number that changes with the training captions or their order."""
        return zlib.crc32(b"".join(source.train.ids.tobytes() for source in self.data.sources))

    def _check(self, meta: Mapping[str, Any]) -> None:
        """That the data has what the objectives need, and is what the run began with."""
        if meta and meta["data"] != self._fingerprint():
            raise CheckpointError("data.sources: got other captions than the run began with, wanted the same pairs")
        if self.config.model.answers:
            raise ValueError(
                f"model.answers: got {len(self.config.model.answers)}, wanted none: with vqa.kind=classification they "
                "are those of the data"
            )
        if "vqa" in self.tasks and not (self.config.data.questions and self.data.answers):
            raise ValueError(
                f"weights.vqa: got an objective of questions beside data.questions={self.config.data.questions} and "
                f"{len(self.data.answers)} answers in the data, wanted data.questions=true and a source with questions"
            )

    def _resumed(self) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to go on from, if the run is to resume and there is one."""
        found = self.checkpoints.latest() if self.config.resume else None
        if not self.config.resume and any(self.folder.glob("step_*")):
            raise ValueError(f"output: got {self.folder}, which has checkpoints; wanted resume=auto or another folder")
        if found is None:
            return None, {}
        path, meta = found
        changed = sorted(_differences(meta["config"], dataclasses.asdict(self.computed)))
        if changed:
            began = meta["config"]["precision"]
            auto = (
                f"; precision was {began} when it began and is {self.precision} here" if "precision" in changed else ""
            )
            raise CheckpointError(
                f"checkpoint {path.name}: got a run with other values of {', '.join(changed)}, wanted the same ones "
                f"(or another output folder){auto}"
            )
        return path, meta


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what a resumed run may not change, with dots; an option that is newer than the run had its default."""
    free = _FREE | {f"data.{name}" for name in _FREE_DATA}

    def walk(a: Any, b: Any, usual: Any, name: str) -> list[str]:
        if name in free:
            return []
        if isinstance(a, dict) and isinstance(b, dict):
            keys, known = {*a, *b}, usual if isinstance(usual, dict) else {}
            below = [(a.get(k, known.get(k)), b.get(k), known.get(k), f"{name}.{k}" if name else k) for k in keys]
            return [d for given in below for d in walk(*given)]
        a, b = (list(v) if isinstance(v, tuple) else v for v in (a, b))
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            return [d for k, pair in enumerate(zip(a, b, strict=True)) for d in walk(*pair, None, f"{name}[{k}]")]
        return [] if a == b else [name]

    return walk(old, new, dataclasses.asdict(Config()), "")
