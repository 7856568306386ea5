"""The stages of a run: where they begin, what each trains, and how much each objective counts at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .config import TASKS, Config, StageConfig, Weights
from .model.config import LOCAL

__all__ = ["GROUPS", "PRESETS", "Stage", "boundaries", "stages_of"]

GROUPS = ("vision", "text", "fusion", "projection", "heads", "scale")
_NEW = ("text", "fusion", "projection", "heads", "scale")
_CONTRAST: Weights = {"itc": 1.0}
_ALL: Weights = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "multiscale": 1.0, "late_interaction": 1.0}
_EVERY: Weights = {**_ALL, "caption": 1.0, "vqa": 1.0}
PRESETS: dict[str, tuple[StageConfig, ...]] = {
    "single": (StageConfig("all", 1.0, _EVERY),),
    # contrast first, without the language side (its projection learns, or nothing could); then matching and words on
    # top of frozen pictures; then everything
    "30/50/20": (
        StageConfig("contrast", 0.3, _CONTRAST, ("vision", "text", "projection", "scale")),
        StageConfig("fusion", 0.5, _ALL, _NEW),
        StageConfig("tasks", 0.2, _EVERY),
    ),
    "80/15/5": (
        StageConfig("contrast", 0.8, _CONTRAST, ("vision", "text", "projection", "scale")),
        StageConfig("fusion", 0.15, _ALL),
        StageConfig("tasks", 0.05, _EVERY),
    ),
}


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `end - 1` of the run.

    Attributes:
        factors: of the run's `weights`, for the built-in stages; 1 for own ones.
    """

    config: StageConfig
    start: int
    end: int
    factors: dict[str, float]

    @property
    def name(self) -> str:
        """As configured."""
        return self.config.name

    @property
    def train(self) -> tuple[str, ...]:
        """The groups that learn."""
        return self.config.train or GROUPS

    @property
    def tasks(self) -> tuple[str, ...]:
        """The objectives with a weight somewhere in the stage."""
        return tuple(t for t in TASKS if any(value for _, value in self._points(t)))

    def weights(self, step: int) -> dict[str, float]:
        """Of every objective at a step of the run; those that are 0 are left out."""
        share = (step - self.start) / max(1, self.end - 1 - self.start)
        found = {task: _line(self._points(task), share) for task in TASKS}
        return {task: weight for task, weight in found.items() if weight}

    def _points(self, task: str) -> list[tuple[float, float]]:
        given, factor = self.config.weights.get(task, 0.0), self.factors.get(task, 0.0)
        points = given if isinstance(given, list) else [(0.0, float(given))]
        return [(at, value * factor) for at, value in points]


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The run's stages, checked.

    Raises:
        ValueError: shares that do not sum to 1, a stage without a step, an unknown preset, group or objective, or
            nothing to train or to learn from, named.
    """
    if not config.stages and config.schedule not in PRESETS:
        raise ValueError(
            f"schedule: got {config.schedule!r}, wanted one of {', '.join(PRESETS)}, or stages of your own"
        )
    given = config.stages or PRESETS[config.schedule]
    unknown = set(config.weights) - set(TASKS)
    if unknown:
        raise ValueError(f"weights: got {', '.join(sorted(unknown))}, wanted objectives out of {', '.join(TASKS)}")
    ends = boundaries(config.steps, [stage.fraction for stage in given])
    factors = dict.fromkeys(TASKS, 1.0) if config.stages else config.weights
    found = tuple(Stage(stage, start, end, factors) for stage, start, end in zip(given, (0, *ends), ends, strict=False))
    for k, stage in enumerate(found):
        _check(f"stages[{k}]", stage)
        for name in LOCAL:
            if name in stage.tasks and name not in config.model.local:
                raise ValueError(
                    f"{f'stages[{k}].' if config.stages else ''}weights.{name}: got an objective of patches beside "
                    f"model.local={list(config.model.local)}, wanted it there"
                )
    return found


def boundaries(steps: int, fractions: Sequence[float]) -> list[int]:
    """The step after the last of each stage: e_k = round(T sum_{j <= k} f_j).

    Raises:
        ValueError: fractions that do not sum to 1, or a stage without a step.
    """
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"stages: got fractions {list(fractions)} of sum {sum(fractions):g}, wanted a sum of 1")
    ends = [round(steps * sum(fractions[: k + 1])) for k in range(len(fractions))]
    ends[-1] = steps
    for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end <= start:
            raise ValueError(f"stages[{k}]: got {fractions[k]:g} of {steps} steps, wanted at least one step")
    return ends


def _check(name: str, stage: Stage) -> None:
    for what, got, wanted in (("weights", stage.config.weights, TASKS), ("train", stage.config.train, GROUPS)):
        unknown = [x for x in got if x not in wanted]
        if unknown:
            raise ValueError(f"{name}.{what}: got {', '.join(unknown)}, wanted some of {', '.join(wanted)}")
    if not stage.tasks:
        raise ValueError(f"{name}.weights: got nothing above 0, wanted at least one objective of {', '.join(TASKS)}")
    for task in stage.config.weights:
        points = stage._points(task)
        places = [at for at, _ in points]
        if not points or any(value < 0 for _, value in points) or places != sorted(places):
            raise ValueError(f"{name}.weights.{task}: got {points}, wanted values >= 0 at shares in ascending order")
    if _nothing(stage):
        raise ValueError(f"{name}.weights: got steps where all are 0, wanted at least one objective at each")


def _nothing(stage: Stage) -> bool:
    """Whether there is a step without any objective: straight lines above 0 can only meet it at their points."""
    places = {at for task in stage.config.weights for at, _ in stage._points(task)} | {0.0, 1.0}
    last = stage.end - 1 - stage.start
    return any(not stage.weights(stage.start + k) for at in places for k in (int(at * last), -int(-at * last // 1)))


def _line(points: list[tuple[float, float]], at: float) -> float:
    """The value at a share, on straight lines between the points."""
    if at <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in pairwise(points):
        if at <= b:
            return low + (high - low) * (at - a) / (b - a) if b > a else high
    return points[-1][1]
