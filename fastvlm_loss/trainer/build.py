"""The parts of a run from its configuration, and what a stage trains of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from ..demo.towers import fast_bf16
from .checkpoint import CheckpointError
from .config import Config, Precision
from .data import Data
from .masking import Masker
from .model import VLPretrainModel
from .momentum import Teacher
from .stages import Stage, stages_of
from .step import number
from .text import Tokenizer
from .world import World

__all__ = ["masker_of", "model_of", "precision_of", "teacher_of"]

_LOG_SCALE = {"siglip_loss": 2.302585}  # ln 10, as published; the model's own is ln(1 / 0.07)


def precision_of(config: Config, world: World) -> Precision:
    """`auto` as what it stands for here; what does not go together is an error.

    Raises:
        ValueError: a scaler beside bf16 or fp32, fp16 beside shards, or a batch that the processes cannot share.
    """
    kind: Precision = config.precision
    if kind == "auto":
        kind = "bf16" if fast_bf16(world.device) else "fp32"
    if config.grad_scaler and kind != "fp16":
        raise ValueError(f"grad_scaler: got true beside precision={kind}, wanted false: only fp16 needs one")
    if kind == "fp16" and config.grad_scaler is False:
        raise ValueError("grad_scaler: got false beside precision=fp16, wanted true: its gradients would vanish")
    if kind == "fp16" and config.strategy != "ddp" and world.size > 1:
        raise ValueError(f"precision: got fp16 beside strategy={config.strategy}, wanted bf16 or fp32")
    if config.batch_size % world.size:
        raise ValueError(f"batch_size: got {config.batch_size} for {world.size} processes, wanted a multiple of them")
    return kind


def model_of(config: Config, data: Data, checkpoint: Path | None) -> VLPretrainModel:
    """A fresh model for this data, the same in every process, or a checkpoint's.

    Raises:
        CheckpointError: the data's answers are not those that the checkpoint's model chooses from.
    """
    answers = tuple(data.answers) if _chooses(config) else ()
    if checkpoint is not None:
        model = VLPretrainModel.load(checkpoint)
        if model.config.answers != answers:
            raise CheckpointError(
                f"data.sources: got {len(answers)} answers to choose from, wanted the {len(model.config.answers)} of "
                f"checkpoint {checkpoint.name}; the first that differs: {_first(answers, model.config.answers)}"
            )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(config.seed, 0, 0, "weights"))
            model = VLPretrainModel.from_pretrained(replace(config.model, answers=answers), data.tokenizer)
        start = config.itc.log_scale if config.itc.log_scale is not None else _LOG_SCALE.get(config.itc.loss)
        if start is not None:
            nn.init.constant_(model.log_scale, start)
    model.prepare(checkpointing=config.checkpointing, compile=config.compile)
    return model


def _first(got: Sequence[str], wanted: Sequence[str]) -> str:
    """What differs first, for an error."""
    return next(f"got {a!r}, wanted {b!r}" for a, b in zip_longest(got, wanted) if a != b)


def _chooses(config: Config) -> bool:
    """Whether questions are answered by a choice."""
    return config.vqa.kind == "classification" and any("vqa" in stage.tasks for stage in stages_of(config))


def teacher_of(config: Config, model: VLPretrainModel, world: World) -> Teacher | None:
    """The momentum model, if the run has one."""
    if not config.momentum.enabled:
        return None
    if config.strategy != "ddp" and world.size > 1:
        raise ValueError(f"momentum.enabled: got true beside strategy={config.strategy}, wanted ddp")
    return Teacher(config.momentum, copy.deepcopy(model), config.model.embed_dim, config.steps, world.device)


def masker_of(config: Config, tokenizer: Tokenizer, stages: Sequence[Stage]) -> Masker | None:
    """For masked words, if a stage has them."""
    if not any("mlm" in stage.tasks for stage in stages):
        return None
    chosen = config.mlm
    return Masker(
        chosen.strategy, tokenizer, seed=config.seed, probability=chosen.probability, whole_word=chosen.whole_word,
        temperature=chosen.temperature, decay=chosen.decay,
    )  # fmt: skip
