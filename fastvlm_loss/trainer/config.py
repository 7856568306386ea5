"""What a run is, as a value: nested dataclasses that a YAML file and dotted arguments fill in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..scores import check
from .data.config import DataConfig
from .model.config import ModelConfig

__all__ = [
    "TASKS",
    "CheckpointConfig",
    "Config",
    "ContrastiveConfig",
    "EvaluationConfig",
    "LocalConfig",
    "MaskedConfig",
    "MatchingConfig",
    "MomentumConfig",
    "OptimizerConfig",
    "QuestionConfig",
    "StageConfig",
    "WeightingConfig",
]  # fmt: skip

TASKS = ("itc", "itm", "mlm", "caption", "vqa", "multiscale", "late_interaction")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Point = tuple[float, float]
Weights = dict[str, float | list[Point]]


@dataclass(frozen=True)
class ContrastiveConfig:
    """The image-text contrastive objective.

    Args:
        loss: a contrastive loss of fastvlm_loss by its name, `clip_loss`, `siglip_loss`, `hard_negative_clip_loss`, ...
        options: its keyword options, for instance `{label_smoothing: 0.1}`.
        log_scale: of the temperature to begin with; ln(1/0.07) by default, ln(10) for `siglip_loss`.
    """

    loss: str = "clip_loss"
    options: dict[str, Any] = field(default_factory=dict)
    log_scale: float | None = None


@dataclass(frozen=True)
class MatchingConfig:
    """Image-text matching with negatives of the batch.

    Args:
        k: negatives of each image and of each text.
        hardness: of the draw at the first and the last step, linear between them: 0 uniform, 1 ALBEF's law.
        random: uniform draws whatever the hardness (the ablation).
        mode: composition of the pairs, as of `fastvlm_loss.itm_batch`.
        composition: shares of the positives, of wrong images and of wrong texts.
    """

    k: int = 1
    hardness: tuple[float, float] = (0.5, 1.0)
    random: bool = False
    mode: Literal["sample", "weight", "albef"] = "sample"
    composition: tuple[float, float, float] = (0.5, 0.25, 0.25)


@dataclass(frozen=True)
class MaskedConfig:
    """Masked language modelling.

    Args:
        strategy: which words are masked (Bitton et al. 2021).
        probability: of a token, for `baseline`.
        whole_word: mask all tokens of a word, for `baseline`.
        temperature: of the `hard` strategy's choice among words.
        decay: of the `hard` strategy's table.
    """

    strategy: Literal["baseline", "objects", "content", "top_concrete", "hard"] = "baseline"
    probability: float = 0.15
    whole_word: bool = False
    temperature: float = 1.0
    decay: float = 0.99


@dataclass(frozen=True)
class LocalConfig:
    """Objectives of a picture's patches, for a model whose `local` names them.

    Args:
        mode: of `multiscale`, as of `fastvlm_loss.multiscale_itm`; its pairs are those of `itm`, drawn alike.
        sharpness: of `multiscale`, likewise.
        interaction: of `late_interaction`, as of `fastvlm_loss.late_interaction_loss`.
    """

    mode: Literal["soft", "hard", "mul"] = "soft"
    sharpness: float = 10.0
    interaction: Literal["filip", "colbert"] = "filip"


@dataclass(frozen=True)
class QuestionConfig:
    """Question answering.

    Args:
        kind: `generative` writes the answer word by word (ALBEF, BLIP); `classification` chooses among the answers of
            the training questions, by a sigmoid each. Those are collected from up to 50,000 samples of a source (2,000
            of `shapes`); a rarer one asks for none of them.
    """

    kind: Literal["generative", "classification"] = "generative"


@dataclass(frozen=True)
class WeightingConfig:
    """How the objectives are weighed against each other, on top of a stage's weights.

    Args:
        kind: `fixed` (all 1), `inverse` (of smoothed losses), `curriculum` (contrast first), `uncertainty` (learned,
            Kendall et al. 2018) or `gradnorm` (Chen et al. 2018).
        decay: of the smoothed losses of `inverse`.
        floor: below which a smoothed loss does not count for `inverse`.
        cap: most that a weight of `inverse` may be.
        boundaries: of `curriculum`, shares of the run at which it passes to the second and the third set of weights.
        power: a of `gradnorm`.
        lr: of the weights of `gradnorm`.
    """

    kind: Literal["fixed", "inverse", "curriculum", "uncertainty", "gradnorm"] = "fixed"
    decay: float = 0.9
    floor: float = 1e-3
    cap: float = 5.0
    boundaries: tuple[float, float] = (0.15, 0.45)
    power: float = 1.5
    lr: float = 0.025


@dataclass(frozen=True)
class MomentumConfig:
    """ALBEF's momentum model: averaged towers as teachers of the contrastive loss, and queues of their features.

    Args:
        enabled: keep the averaged towers.
        decay: of the average.
        alpha: share of the soft targets.
        ramp: share of the run over which alpha grows from 0.
        queue: features kept as further negatives; 0 for none.
    """

    enabled: bool = False
    decay: float = 0.995
    alpha: float = 0.4
    ramp: float = 0.1
    queue: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and a cosine.

    Args:
        lr: highest learning rate.
        weight_decay: of matrices; not of biases, norms, temperature.
        betas: of AdamW.
        warmup: share of the run; what a later stage adds to training warms up over `stage_warmup` of that stage.
        stage_warmup: see `warmup`.
        final: learning rate at the end, as a share of `lr`.
        clip: largest norm of the gradient; 0 for none.
        fused: the fused kernel of AdamW; by default where there is one.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.1
    stage_warmup: float = 0.05
    final: float = 0.0
    clip: float = 1.0
    fused: bool | None = None


@dataclass(frozen=True)
class StageConfig:
    """A part of the run.

    Args:
        name: shown in the log and the report.
        fraction: of the run's steps; those of all stages sum to 1.
        weights: of the objectives: a number, or points [share of the stage, value] with lines between them. What is
            not named has weight 0 and costs nothing.
        train: groups of the model that learn (`vision`, `text`, `fusion`, `projection`, `heads`, `scale`); the others
            are frozen: no gradient, evaluation mode. Empty: all.
        lr: factor on the learning rate.
        sources: weights of the data sources in this stage; empty: those of the data.
    """

    name: str
    fraction: float
    weights: Weights
    train: tuple[str, ...] = ()
    lr: float = 1.0
    sources: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is written to disk.

    Args:
        every: steps; 0 for the end alone.
        keep: newest checkpoints that stay; older ones are deleted.
        best: the evaluation's figure by which one more is kept (its highest), or empty.
    """

    every: int = 100
    keep: int = 2
    best: str = "retrieval/r10"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out pairs, in between and at the end.

    Args:
        every: steps; 0 for the end alone.
        limit: held-out pairs at most.
        rerank: candidates of each query that are put into a new order; 0 for none.
        evidence: pictures that each caption's words are read beside, so that masked words can re-rank the candidates,
            too; 0 for none. That takes several times as long as matching.

    Raises:
        TypeError, ValueError: a number below 0, or evidence for no candidates.
    """

    every: int = 0
    limit: int = 1000
    rerank: int = 16
    evidence: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "limit", "rerank", "evidence"):
            check.whole(f"evaluation.{name}", getattr(self, name), low=0)
        if self.evidence and not self.rerank:
            raise ValueError(f"evaluation.evidence: got {self.evidence} beside rerank=0, wanted candidates to re-rank")


@dataclass(frozen=True)
class Config:
    """A training run.

    Args:
        output: folder of checkpoints, log and report.
        resume: `auto` goes on from the newest whole checkpoint in `output`, and begins where there is none; without it
            a folder with checkpoints is refused.
        steps: optimiser steps.
        batch_size: pairs of a step, of all processes together.
        micro_batch: pairs of a forward pass of the encoders in one process (gradient caching, exactly the gradient of
            the whole batch); 0 for the whole batch at once.
        seed: of everything that is drawn.
        precision: `fp32`, `bf16` (autocast), `fp16` (autocast and a gradient scaler), or `auto`: bf16 where it is fast.
        grad_scaler: by default with `fp16` alone; refused with `bf16`, which needs none.
        strategy: `ddp` copies the model to every process, `fsdp` shards parameters, gradients and optimiser, `zero2`
            shards gradients and optimiser.
        checkpointing: recompute the towers' and the fusion encoder's activations in backward.
        compile: `torch.compile` of towers and fusion encoder.
        schedule: built-in stages: `single`, `30/50/20` or `80/15/5`; unused where `stages` are given.
        stages: own ones.
        weights: of the objectives in the built-in stages, factors on what the stage gives.
        device: `auto` takes a GPU where there is one.
        threads: of the CPU; 0 for torch's choice.
        tensorboard: write its files beside the log.
    """

    output: str = "runs/trainer"
    resume: Literal["", "auto"] = ""
    steps: int = 1000
    batch_size: int = 256
    micro_batch: int = 0
    seed: int = 0
    precision: Precision = "auto"
    grad_scaler: bool | None = None
    strategy: Literal["ddp", "fsdp", "zero2"] = "ddp"
    checkpointing: bool = False
    compile: bool = False
    schedule: str = "single"
    stages: tuple[StageConfig, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: {"itc": 1.0, "itm": 1.0, "mlm": 1.0})
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    tensorboard: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    itc: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    itm: MatchingConfig = field(default_factory=MatchingConfig)
    mlm: MaskedConfig = field(default_factory=MaskedConfig)
    vqa: QuestionConfig = field(default_factory=QuestionConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
