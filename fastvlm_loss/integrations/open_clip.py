"""open_clip's losses without the score matrix: its constructors, its `forward`, its keys, for 3.3 and later.

The gradients are open_clip's in each of its four ways to gather (`local_loss`, `gather_with_grad`). The value is that
of the whole batch in every process; open_clip returns the process's share where both are set, and in SigLipLoss.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import open_clip.loss
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss as Original  # whatever stands in its place later
from torch import Tensor

from ..distributed import shard_of
from ..losses import siglip_loss
from ..losses._batch import Batch
from ..scores import check
from ._patch import Patch
from ._versions import require

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "patch_open_clip"]

require("open_clip_torch")


@dataclass(frozen=True)
class _Pairs:
    """Anchors and candidates `[n, D]`, `[N, D]`, and a teacher's of both."""

    anchors: Tensor
    candidates: Tensor
    teacher: tuple[Tensor, Tensor] | None = None
    labels: Tensor | None = None
    group: Any = None

    @property
    def features(self) -> tuple[Tensor, ...]:
        """All that has a row for each sample."""
        return self.anchors, self.candidates, *(self.teacher or ())

    def with_features(self, anchors: Tensor, candidates: Tensor, *teacher: Any) -> _Pairs:
        """The same with other features."""
        return replace(self, anchors=anchors, candidates=candidates, teacher=teacher or None)

    def losses(self, scale: Tensor, bias: Tensor | None, teacher_scale: Tensor | None) -> Tensor:
        """The contrastive loss, and the distillation loss where there is a teacher, `[1]` or `[2]`, of one pass."""
        batch = Batch.of(
            self.anchors, self.candidates, scale, bias, labels=self.labels, group=self.group,
            directions="both" if self.labels is None else "image",
        )  # fmt: skip
        if self.teacher is None:
            t = batch.softmax()
            return batch.reduce(t.nll, t)[None]
        assert teacher_scale is not None
        batch = batch.but(problem=batch.problem.taught(*self.teacher, teacher_scale))
        t = batch.softmax()
        assert t.gap is not None
        return torch.stack([batch.reduce(t.nll, t), batch.reduce(t.nll + t.gap, t)])


class ClipLoss(Original):  # type: ignore[misc]
    """`open_clip.loss.ClipLoss` on `clip_loss`; `get_logits` is still there for those who want the matrix.

    Args:
        local_loss, gather_with_grad: as of open_clip; how gradients come back from the other processes. Both set, or
            `gather_with_grad` alone, give the gradient of the whole batch; neither gives a `world_size`-th of it to the
            towers; `local_loss` alone gives each feature the gradient as an anchor and none as a candidate.
        cache_labels: taken for the constructor's sake; there are no labels.
        rank, world_size: of `torch.distributed`'s default group.
        use_horovod: must be false.

    Raises:
        ValueError: `use_horovod`; in `forward`, a `world_size` that is not that of the default group.

    Source: Radford et al. 2021 (CLIP), figure 3.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        if use_horovod:
            raise ValueError("use_horovod: got True, wanted False: features are gathered by torch.distributed")
        Original.__init__(
            self, local_loss=local_loss, gather_with_grad=gather_with_grad, cache_labels=cache_labels, rank=rank,
            world_size=world_size,
        )  # fmt: skip

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """The loss, fp32 `[]`, or `{"contrastive_loss": loss}`; `logit_scale` is multiplied, of shape `[]` or `[1]`."""
        (loss,) = self._losses(_Pairs(image_features, text_features), logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _losses(
        self, pairs: _Pairs, scale: Tensor, bias: Tensor | None = None, teacher_scale: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        parts = [view.losses(scale, bias, teacher_scale) for view in self._views(pairs)]
        return torch.stack(parts).mean(0).unbind()

    def _views(self, pairs: _Pairs) -> Iterator[_Pairs]:
        """The score matrices whose mean is the loss: one of both directions, or one for each."""
        group = _world(self.world_size)
        if group is None:
            yield pairs
        elif self.gather_with_grad:
            yield replace(pairs, group=group)
        elif not self.local_loss:
            shares = (_Scaled.apply(f, 1 / self.world_size) for f in pairs.features)
            yield replace(pairs.with_features(*shares), group=group)
        else:
            shard = shard_of(group, pairs.anchors, pairs.candidates)
            every = [shard.collectives.gather(f.detach(), shard.rows) for f in pairs.features]
            labels = torch.arange(shard.own_rows.start, shard.own_rows.stop, device=pairs.anchors.device)
            own, count = pairs.features, len(every)
            for a, c in ((0, 1), (1, 0)):  # images choose among texts, texts among images
                mixed = [f for k in range(0, count, 2) for f in (own[k + a], every[k + c])]
                yield replace(pairs.with_features(*mixed), labels=labels)


class DistillClipLoss(ClipLoss, open_clip.loss.DistillClipLoss):  # type: ignore[misc]
    """`open_clip.loss.DistillClipLoss`: `ClipLoss`, and as much from a teacher's beliefs, of the same pass.

    Source: `soft_target_clip_loss` with alpha = 1; Hinton et al. 2015, section 2.
    """

    def forward(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: Tensor, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Both losses, or `{"contrastive_loss": ..., "distill_loss": ...}`."""
        teacher = dist_image_features.to(image_features.dtype), dist_text_features.to(text_features.dtype)
        losses = self._losses(
            _Pairs(image_features, text_features, teacher), logit_scale, teacher_scale=dist_logit_scale
        )
        return dict(zip(("contrastive_loss", "distill_loss"), losses, strict=True)) if output_dict else losses


class CoCaLoss(ClipLoss, open_clip.loss.CoCaLoss):  # type: ignore[misc]
    """`open_clip.loss.CoCaLoss`: a weighted `ClipLoss`, and the cross-entropy of the caption logits that CoCa makes.

    The logits `[B, T, V]` are the model's output; `caption_loss` is for models that give their hidden states instead.

    Source: Yu et al. 2022 (CoCa), equation 4.
    """

    def __init__(
        self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0, local_loss: bool = False,
        gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0, world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight, self.caption_loss_weight = clip_loss_weight, caption_loss_weight
        self.caption_loss = torch.nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logits: Tensor, labels: Tensor, logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Contrastive and caption loss, or `{"contrastive_loss": ..., "caption_loss": ...}`."""
        clip = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            clip = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = self.caption_loss_weight * self.caption_loss(logits.flatten(0, 1), labels.flatten())
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)


class SigLipLoss(open_clip.loss.SigLipLoss):  # type: ignore[misc]
    """`open_clip.loss.SigLipLoss` on `siglip_loss`.

    Args:
        cache_labels: taken for the constructor's sake.
        rank, world_size: of `torch.distributed`'s default group.
        dist_impl: open_clip's names are taken; all mean the same here (`fastvlm_loss.set_gather_limit` says whether
            features are gathered or travel in a ring).
        chunk_size: taken and without effect: the matrix is never built.

    Raises:
        ValueError: in `forward`, a `world_size` that is not that of the default group.

    Source: Zhai et al. 2023 (SigLIP), equation 1.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:  # fmt: skip
        check.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        super().__init__(cache_labels=cache_labels, rank=rank, world_size=world_size, dist_impl=dist_impl)
        self.chunk_size = chunk_size

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """The loss, fp32 `[]`, or `{"contrastive_loss": loss}`."""
        group = _world(self.world_size)
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class _Scaled(torch.autograd.Function):
    """Itself, with a share of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


def _world(size: int) -> Any:
    """The default group, or None for one process."""
    if size == 1:
        return None
    found = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if found != size:
        raise ValueError(f"world_size: got {size}, wanted {found}, that of torch.distributed's default group")
    return dist.group.WORLD


_OURS: dict[Any, Any] = {
    getattr(open_clip.loss, c.__name__): c for c in (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss)
}


class _Losses(Patch):
    """What imported one of our losses while it stood in open_clip's place gets open_clip's back."""

    def undo(self) -> None:
        theirs, made = {ours: old for old, ours in _OURS.items()}, bool(self._replaced)
        super().undo()
        for module, name, loss in _places(theirs) if made else ():
            setattr(module, name, theirs[loss])


def patch_open_clip() -> Patch:
    """Put these losses in the place of open_clip's, wherever open_clip and open_clip_train look for them.

    A plain call, undone by `.undo()` of what it returns, or a context manager. It serves `create_loss`, the training
    entry point and the tasks; a loss that was made before keeps its class, and so does what your own code imported by
    name before the call. While one stands another finds nothing to replace, and the first alone undoes it.

    Raises:
        ImportError: a version of open_clip that this does not know, when this module is imported.
    """
    patch = _Losses()
    for module, name, loss in _places(_OURS):
        patch.set(module, name, _OURS[loss])
    return patch


def _places(losses: dict[Any, Any]) -> list[tuple[ModuleType, str, Any]]:
    """Where open_clip's modules hold one of the losses."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("open_clip", "open_clip_train")]
    return [(m, n, v) for m in modules for n, v in list(vars(m).items()) if isinstance(v, type) and v in losses]
