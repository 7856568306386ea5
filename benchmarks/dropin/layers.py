"""Memory and time of the loss layer: each package's loss and ours at one size, forward and backward."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import ALLOCATOR, ROOT, extra

__all__ = ["LAYERS", "ROUNDS", "D", "N", "peak", "times"]

N, D = 8192, 512
ROUNDS = 5
Call = Callable[[Tensor, Tensor], Tensor]


def _open_clip(kind: str) -> Callable[[bool], Call]:
    def made(ours: bool) -> Call:
        import open_clip.loss as theirs

        from fastvlm_loss.integrations import open_clip as replaced

        loss = getattr(replaced if ours else theirs, kind)()
        scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        if kind == "SigLipLoss":
            return lambda image, text: loss(image, text, scale, bias)
        if kind == "DistillClipLoss":
            return lambda image, text: sum(loss(image, text, scale, image.detach(), text.detach(), scale.detach()))
        return lambda image, text: loss(image, text, scale)

    return made


def _coca(ours: bool) -> Call:
    import open_clip.loss as theirs

    from fastvlm_loss.integrations import open_clip as replaced

    loss = (replaced if ours else theirs).CoCaLoss(2.0, 1.0)
    scale = torch.tensor(14.3, requires_grad=True)

    def call(image: Tensor, text: Tensor) -> Tensor:
        captions = image[:, None, :8], torch.ones(len(image), 1, dtype=torch.int64)  # of a word each, of 8 words
        total: Tensor = sum(loss(image, text, *captions, scale))
        return total

    return call


def _transformers(name: str) -> Callable[[bool], Call]:
    """The model's own forward, with towers that hand the features on."""

    def made(ours: bool) -> Call:
        import transformers as tf

        from fastvlm_loss.integrations.transformers import patch_transformers

        tower = {"hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1}
        config = getattr(tf, f"{name}Config")(
            text_config={**tower, "projection_size": D}, vision_config={**tower, "image_size": 8, "patch_size": 8},
            projection_dim=D,
        )  # fmt: skip
        model = getattr(tf, f"{name}Model")(config)
        for tower_name, features in (("vision_model", 0), ("text_model", 1)):
            setattr(model, tower_name, _Given(features))
        for projection in ("visual_projection", "text_projection"):
            setattr(model, projection, torch.nn.Identity())
        if ours:
            patch_transformers(model)
        return lambda image, text: model(input_ids=text, pixel_values=image, return_loss=True).loss

    return made


class _Given(torch.nn.Module):
    """A tower whose features are its input."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.name = ("pixel_values", "input_ids")[place]

    def forward(self, *given: Tensor, **named: Any) -> Any:
        """Outputs as a tower's."""
        return _Output(pooler_output=named.get(self.name, given[0] if given else None))


class _Output(SimpleNamespace):
    """What is asked for by name or by place."""

    def __getitem__(self, place: int) -> Any:
        return self.pooler_output


def _sentence_transformers(ours: bool) -> Call:
    from sentence_transformers.sentence_transformer import losses as theirs

    from fastvlm_loss.integrations import sentence_transformers as replaced

    loss = (replaced if ours else theirs).MultipleNegativesRankingLoss(torch.nn.Identity())
    return lambda query, document: loss.compute_loss_from_embeddings([query, document], None)


def _metric_learning(ours: bool) -> Call:
    from pytorch_metric_learning import losses as theirs

    from fastvlm_loss.integrations import metric_learning as replaced

    loss = theirs.SelfSupervisedLoss((replaced if ours else theirs).NTXentLoss(), symmetric=False)
    return lambda first, second: loss(first, second)


def _lightly(ours: bool) -> Call:
    import lightly.loss as theirs

    from fastvlm_loss.integrations import lightly as replaced

    loss = (replaced if ours else theirs).NTXentLoss()
    return lambda first, second: loss(first, second)


# by package and class
LAYERS: dict[tuple[str, str], Callable[[bool], Call]] = {
    **{("open_clip", kind): _open_clip(kind) for kind in ("ClipLoss", "SigLipLoss", "DistillClipLoss")},
    ("open_clip", "CoCaLoss"): _coca,
    **{("transformers", f"{name}Model"): _transformers(name) for name in ("CLIP", "Siglip")},
    ("sentence_transformers", "MultipleNegativesRankingLoss"): _sentence_transformers,
    ("metric_learning", "NTXentLoss"): _metric_learning,
    ("lightly", "NTXentLoss"): _lightly,
}


def peak(package: str, kind: str, ours: bool) -> int:
    """Bytes that a call holds at its peak beyond features and their gradients, at N = 8192, D = 512, fp32."""
    command = [sys.executable, "-m", f"{__package__}.layers", json.dumps([package, kind, ours])]
    environment = {**os.environ, **ALLOCATOR, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{package}.{kind}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])


def _child(package: str, kind: str, ours: bool) -> int:
    call = LAYERS[package, kind](ours)

    def held(n: int) -> int:
        given = _features(n)
        return extra(lambda: torch.autograd.grad(call(*given), given), "cpu")[1]

    held(64)  # so that libraries and threads are not counted
    return held(N)


def times(package: str, kind: str) -> tuple[float, float]:
    """Median seconds of the package's loss and of ours, called in turn."""
    calls, given = [LAYERS[package, kind](ours) for ours in (False, True)], _features(N)
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(ROUNDS + 1):  # the first to warm up
        for call, samples in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            torch.autograd.grad(call(*given), given)
            if turn:
                samples.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _features(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, D, generator=g), dim=1).requires_grad_() for _ in range(2)]


if __name__ == "__main__":
    print(_child(*json.loads(sys.argv[1])))
