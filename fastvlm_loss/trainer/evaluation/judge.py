"""The evaluation of a run: figures of its objectives, in per cent, and examples."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import Config
from ..data.batch import Collator
from ..data.samples import Sample
from ..data.words import WordKinds
from ..parallel import unwrapped
from ..step import autocast, logit_scale
from ..text import Tokenizer
from .captions import Caption, captions, some_captions
from .evidence import WEIGHT, evidence
from .held import Held, encode, spread
from .looking import Look, Picks, looks, picks
from .matching import hard, near
from .patches import late_interaction, multiscale
from .questions import Answer, questions, some_answers
from .retrieval import Ranking, candidates, contrast, csls, guessed, rank, recalls, rerank
from .titles import table
from .words import words
from .zeroshot import zeroshot

__all__ = ["Evaluation", "evaluate"]

_SHOWN = 8  # samples of each kind of example
_LISTED = 5  # answers of a query that a report lists


@dataclass(frozen=True)
class Evaluation:
    """What was found on the held-out pairs.

    Attributes:
        figures: by name, in per cent; only those of the run's objectives. What guessing would give is among them:
            `retrieval/chance_r1`, `mlm/accuracy_blind`, `vqa/majority`, `zeroshot/chance`.
        config, samples: of the evaluation.
        ids: int64 `[N]`; equal captions have equal ids.
        images, texts: fp32 `[N, D]`, the features, on the CPU.
        rankings: `retrieval`, `csls`, `rerank` and `evidence`, each by `i2t` and `t2i`.
        picks, looks, captions, answers: examples, of the objectives that the run has.
    """

    figures: dict[str, float]
    config: Config
    samples: Sequence[Sample] = ()
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    images: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    texts: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    rankings: dict[str, dict[str, Ranking]] = field(default_factory=dict)
    picks: Picks | None = None
    looks: list[Look] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def table(self) -> str:
        """The figures as text for a terminal."""
        return table(self.figures, len(self.samples))


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: Tokenizer, held: Sequence[Sample], config: Config, device: torch.device,
    precision: str, tasks: Collection[str],
) -> Evaluation:  # fmt: skip
    """Judge a model on held-out samples with their pictures; the same in every call and process.

    The model is left in the mode that it came in, every part of it; no global generator is drawn from.

    Args:
        model: a `VLPretrainModel`, wrapped or not; it is called as `model(part, ...)` alone.
        precision: `fp32`, `bf16` or `fp16`, of autocast.
        tasks: the run's objectives: `itc` is judged by retrieval and zero-shot classification, `itm` by re-ranking and
            matching, `multiscale` by matching, `late_interaction` by retrieval of its own, `mlm` by masked words and,
            where `evaluation.evidence` asks for it, re-ranking, `caption` by what the model writes, `vqa` by what it
            answers.
    """
    if not held:
        return Evaluation({}, config)
    data, seed = config.data, config.seed
    collate = Collator(
        tokenizer, WordKinds(data.object_words, data.concreteness), data.context_length, data.question_length,
        full=data.full_length,
    )  # fmt: skip
    with _judged(model), autocast(device, precision):
        found = encode(model, tokenizer, collate, held, device)
        shown = spread(len(found), _SHOWN)
        choices = unwrapped(model).config.answers if config.vqa.kind == "classification" else ()
        figures, rankings = _ranked(found, config, tasks)
        if {"itc", "late_interaction"} & set(tasks):
            figures |= guessed(found.ids)
        if "itc" in tasks:
            figures |= zeroshot(found, data)
        if "itm" in tasks:
            figures |= {**hard(found, config.batch_size), **near(found)}
        if "multiscale" in tasks:
            figures |= multiscale(found, config.batch_size, config.local)
        if "late_interaction" in tasks:
            figures |= late_interaction(found, config.local)
        if "mlm" in tasks:
            figures |= words(found, seed)
        if "caption" in tasks:
            figures |= captions(found)
        if "vqa" in tasks:
            figures |= questions(found, choices)
        return Evaluation(
            figures, config, held, found.ids, found.features.float().cpu(), found.texts.features.float().cpu(),
            rankings,
            picks(found, shown, config.batch_size, seed) if {"itc", "itm"} & set(tasks) else None,
            looks(found, shown, seed) if "mlm" in tasks else [],
            some_captions(found, shown, seed) if "caption" in tasks else [],
            some_answers(found, shown, choices) if "vqa" in tasks else [],
        )  # fmt: skip


def _ranked(
    held: Held, config: Config, tasks: Collection[str]
) -> tuple[dict[str, float], dict[str, dict[str, Ranking]]]:
    if "itc" not in tasks:
        return {}, {}
    wanted, scale = config.evaluation, logit_scale(held.model)
    shown = max(wanted.rerank, _LISTED)
    rankings = {"retrieval": rank(held, shown), "csls": csls(held, shown)}
    if wanted.rerank and "itm" in tasks:
        pairs = candidates(rankings["retrieval"], wanted.rerank)
        scores = contrast(held, *pairs, scale) + held.match(*pairs)
        rankings["rerank"] = rerank(rankings["retrieval"], *pairs, scores, held.ids)
    if wanted.evidence and "mlm" in tasks:
        pairs = candidates(rankings["csls"], wanted.rerank)
        scores = contrast(held, *pairs, scale, hubs=False) + WEIGHT * evidence(
            held, *pairs, wanted.evidence, config.seed
        )
        rankings["evidence"] = rerank(rankings["csls"], *pairs, scores, held.ids)
    return {name: value for kind, found in rankings.items() for name, value in recalls(found, kind).items()}, rankings


@contextmanager
def _judged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back: part by part, because frozen parts are in it anyway."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
