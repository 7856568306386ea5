"""What each loss is compared with: one table by the loss's name; what is not installed is skipped with its reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor

from fastvlm_loss import backend
from fastvlm_loss.losses import LossSpec, registry

from . import adapters, dense
from .adapters import MissingError
from .dense import Loss, autocast

__all__ = [
    "BASELINES", "COMPILED", "DENSE", "METRICS", "OURS", "PEERS", "QUADRATIC", "WITHOUT", "contestants", "makers",
    "on_backend",
]  # fmt: skip

OURS, DENSE, COMPILED = "fastvlm_loss", "dense", "dense, torch.compile"
METRICS = f"{OURS}, with metrics"
OPEN_CLIP = {
    "clip_loss": "open_clip ClipLoss",
    "siglip_loss": "open_clip SigLipLoss",
    "soft_target_clip_loss": "open_clip DistillClipLoss",
}
QUADRATIC = {DENSE, COMPILED, *OPEN_CLIP.values()}  # they hold all scores
WITHOUT = {"memeff": ("logit_scale",)}  # gradients a baseline does not have
TORCH_BACKEND = ("clip_loss", "siglip_loss")  # where our slow backend is a row; of the others it would tell no more


def contestants(spec: LossSpec, peers: bool = False) -> tuple[dict[str, Loss], dict[str, str]]:
    """Everything that computes this loss, ours first, and the reason for each baseline that is missing."""
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    for name, make in makers(spec, peers).items():
        try:
            found[name] = make()
        except MissingError as reason:
            missing[name] = str(reason)
    return found, missing


def makers(spec: LossSpec, peers: bool = False) -> dict[str, Callable[[], Loss]]:
    """How to make each contestant, all called by name; one may raise `MissingError`.

    `peers` adds the baselines of a GPU and leaves out our slow backend.
    """
    slow = spec.name in TORCH_BACKEND and not peers
    return {
        OURS: lambda: spec.function,
        **({f"{OURS}, torch backend": lambda: on_backend(spec, "torch")} if slow else {}),
        DENSE: lambda: dense.WRITTEN.get(spec.name) or on_backend(spec, DENSE),
        **BASELINES.get(spec.name, {}),
        **(PEERS.get(spec.name, {}) if peers else {}),
    }


def on_backend(spec: LossSpec, name: str) -> Loss:
    """The loss on one of our backends; the dense one under autocast, as users of a dense loss run it."""

    def loss(**named: Tensor) -> Tensor:
        with backend(name), autocast(next(iter(named.values()))) if name == DENSE else nullcontext():
            return spec.function(**named)

    return loss


BASELINES: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip_loss": {
        METRICS: lambda: adapters.with_metrics(registry["clip_loss"].function),
        OPEN_CLIP["clip_loss"]: adapters.clip_open_clip,
        "linear_cross_entropy twice": adapters.twice(adapters.linear_cross_entropy),
        "chunked PyTorch": adapters.clip_chunked,
    },
    "siglip_loss": {OPEN_CLIP["siglip_loss"]: adapters.siglip_open_clip},
    "soft_target_clip_loss": {OPEN_CLIP["soft_target_clip_loss"]: adapters.soft_target_open_clip},
    "hard_negative_clip_loss": {
        "sentence-transformers MultipleNegativesRankingLoss": adapters.left_out("it brings transformers with it"),
    },
    "linear_cross_entropy": {"torch linear_cross_entropy": adapters.linear_cross_entropy},
}

PEERS: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip_loss": {
        COMPILED: adapters.compiled(dense.clip_loss),
        "Inf-CL": adapters.clip_inf_cl,
        "memeff": adapters.clip_memeff,
        "Cut Cross-Entropy twice": adapters.twice(adapters.cut_cross_entropy),
        "Liger twice": adapters.twice(adapters.liger),
    },
    "siglip_loss": {
        COMPILED: adapters.compiled(dense.siglip_loss),
        "siglip-kernel": adapters.siglip_kernel,
    },
    "linear_cross_entropy": {
        COMPILED: adapters.compiled(dense.linear_cross_entropy),
        "Cut Cross-Entropy": adapters.cut_cross_entropy,
        "Liger": adapters.liger,
    },
}
