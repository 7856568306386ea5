"""What each loss is compared with: one table by the loss's name; what is not installed is skipped with its reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor

from fastvlm_loss import backend
from fastvlm_loss.losses import LossSpec

from . import adapters
from .adapters import Loss, MissingError, autocast

__all__ = ["BASELINES", "COMPILED", "DENSE", "OURS", "PEERS", "WITHOUT", "contestants", "makers", "on_backend"]

OURS, DENSE, COMPILED = "fastvlm_loss", "dense", "dense, torch.compile"
OPEN_CLIP = {"clip_loss": "open_clip ClipLoss", "siglip_loss": "open_clip SigLipLoss"}
QUADRATIC = {DENSE, COMPILED, *OPEN_CLIP.values()}  # they hold all scores
WITHOUT = {"memeff": ("logit_scale",)}  # gradients a baseline does not have


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
    """How to make each contestant; one may raise `MissingError`.

    `peers` adds the baselines of a GPU and leaves out our slow backend.
    """
    torch_backend = {} if peers else {f"{OURS}, torch backend": lambda: on_backend(spec, "torch")}
    return {
        OURS: lambda: spec.function,
        **torch_backend,
        DENSE: lambda: on_backend(spec, DENSE),
        **BASELINES.get(spec.name, {}),
        **(PEERS.get(spec.name, {}) if peers else {}),
    }


def on_backend(spec: LossSpec, name: str) -> Loss:
    """The loss on one of our backends; the dense one under autocast, as users of a dense loss run it."""

    def loss(image_features: Tensor, text_features: Tensor, *scalars: Tensor, **named: Tensor) -> Tensor:
        with backend(name), autocast(image_features) if name == DENSE else nullcontext():
            return spec.function(image_features, text_features, *scalars, **named)

    return loss


BASELINES: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip_loss": {
        DENSE: adapters.clip_dense,
        OPEN_CLIP["clip_loss"]: adapters.clip_open_clip,
        "linear_cross_entropy twice": adapters.clip_linear_cross_entropy,
        "chunked PyTorch": adapters.clip_chunked,
    },
    "siglip_loss": {
        DENSE: adapters.siglip_dense,
        OPEN_CLIP["siglip_loss"]: adapters.siglip_open_clip,
    },
}

PEERS: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip_loss": {
        COMPILED: adapters.compiled(adapters.clip_dense),
        "Inf-CL": adapters.clip_inf_cl,
        "memeff": adapters.clip_memeff,
        "Cut Cross-Entropy twice": adapters.clip_cut_cross_entropy,
        "Liger twice": adapters.clip_liger,
    },
    "siglip_loss": {
        COMPILED: adapters.compiled(adapters.siglip_dense),
        "siglip-kernel": adapters.siglip_kernel,
    },
}
