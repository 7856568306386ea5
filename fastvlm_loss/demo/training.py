"""A run as a value that advances step by step, and its checkpoint: nothing random is carried, so resuming is exact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

import fastvlm_loss

from ..data import Batch, Pairs, WordTokenizer, batches
from .augment import augment
from .evaluation import in_batch_accuracy
from .options import Config
from .towers import TwoTowers

WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.05
CURVES = ("loss", "accuracy", "scale")


class CheckpointError(ValueError):
    """A file that is no checkpoint of this program."""


@dataclass
class Run:
    """Towers, optimiser, tokenizer, the number of steps done, and one value a step of loss, accuracy and scale."""

    config: Config
    tokenizer: WordTokenizer
    device: torch.device
    fingerprint: int  # of the training captions: another set would give other batches
    model: TwoTowers = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})

    def __post_init__(self) -> None:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = TwoTowers(config.size, len(self.tokenizer), self.tokenizer.context_length)
        self.model = model.to(self.device)
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]  # logit scale, biases and norms are not decayed
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))

    @classmethod
    def begin(cls, config: Config, train: Pairs, device: torch.device) -> Run:
        """A fresh run; its vocabulary is the words of the training captions and tags."""
        texts = [*train.captions, *{tag for tags in train.tags or () for tag in tags}]
        return cls(config, WordTokenizer.from_texts(texts), device, fingerprint(train))

    def advance(self, train: Pairs, until: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Train up to step ``until`` or until ``stopped()``, yielding each batch after its step.

        Raises CheckpointError where ``train`` is not what the run began with.
        """
        config = self.config
        if fingerprint(train) != self.fingerprint:
            raise CheckpointError(f"--resume: got {train.name} with other captions than before, wanted the same pairs")
        for batch in batches(train, config.batch_size, config.seed, min(until, config.steps), self.step):
            self._train(batch)
            yield batch
            if stopped():
                return

    def _train(self, batch: Batch) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, batch.step)
        ids = batch.ids.to(self.device)
        pictures = batch.images.to(self.device)
        if self.config.data != "shapes":  # which never repeat, so there is nothing to learn by heart
            pictures = augment(pictures, self.config.seed, batch.step)
        images, texts = self.model(pictures, self.tokenizer(batch.texts).to(self.device))
        logit_scale = self.model.logit_scale
        loss = contrast(self.config.loss, images, texts, logit_scale, ids)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        accuracy = in_batch_accuracy(images.detach(), texts.detach(), ids)
        for name, value in zip(CURVES, (loss.item(), accuracy, logit_scale.item()), strict=True):
            self.curves[name].append(value)
        self.step = batch.step + 1

    def save(self, path: Path) -> None:
        """Write the checkpoint; a crash in between leaves the old one."""
        state = {
            "format": 1,
            "config": asdict(self.config),
            "step": self.step,
            "curves": self.curves,
            "fingerprint": self.fingerprint,
            "vocabulary": self.tokenizer.vocabulary,
            "context_length": self.tokenizer.context_length,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            torch.save(state, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Run:
        """The run as it was saved. Raises CheckpointError for any other file."""
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            tokenizer = WordTokenizer(state["vocabulary"], state["context_length"])
            run = cls(Config(**state["config"]), tokenizer, device, state["fingerprint"])
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.step, run.curves = state["step"], state["curves"]
        except Exception as error:  # torch.load raises as many kinds as there are ways to be damaged
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            raise CheckpointError(f"--resume: got {path}, which is no checkpoint of this program ({reason})") from error
        return run


def contrast(loss: str, images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Tensor | None = None) -> Tensor:
    """The symmetric contrastive loss by the library (``fastvlm``) or its dense reference (``dense``).

    Equal captions have equal ids, so a duplicate in the batch is no false negative.
    """
    if loss == "dense":
        with fastvlm_loss.backend("dense"):
            return fastvlm_loss.clip_loss(images, texts, logit_scale, text_ids=ids)
    return fastvlm_loss.clip_loss(images, texts, logit_scale, text_ids=ids)


def fingerprint(pairs: Pairs) -> int:
    """A number that changes with the captions or their order."""
    return crc32("\n".join(pairs.captions).encode("utf-8", "replace"))


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over a tenth of the steps, then half a cosine down to zero."""
    warm = max(1, round(WARMUP * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))
