"""What the losses of a vocabulary share: tokens and their targets, checked, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scores import check
from ..scores.problem import Problem

__all__ = ["TokenBatch", "shifted"]


@dataclass(frozen=True)
class TokenBatch:
    """The problem of n tokens and V words, and where its tokens came from.

    Attributes:
        problem: of the tokens that count, or where those cannot be known without waiting, of all.
        weights: `[n]` of the statistics' dtype, 0 for a token that does not count, with gradient.
        kept: which of the tokens given these are, or None for all.
        shape: of the targets given.
    """

    problem: Problem
    weights: Tensor
    kept: Tensor | None
    shape: torch.Size

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int,
        token_weights: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    ) -> TokenBatch:  # fmt: skip
        """Check the arguments of `linear_cross_entropy`."""
        x, shape = check.tokens("hidden", hidden), hidden.shape[:-1]
        count = x.shape[0]
        target = check.whole_numbers("targets", targets, shape, x).reshape(-1)
        w = None if token_weights is None else check.floating("token_weights", token_weights, shape, x).reshape(-1)
        teacher = None if teacher_hidden is None else check.tokens("teacher_hidden", teacher_hidden).detach()
        if teacher is not None and teacher.shape[0] != count:
            raise ValueError(f"teacher_hidden: got {teacher.shape[0]} tokens, wanted {count} as in hidden")
        counts, kept = _counting(target, check.features("weight", weight).shape[0], ignore_index), None
        if check.readable(counts) and not bool(counts.all()):
            kept = counts.nonzero()[:, 0]
            x, target = x[kept], target[kept]
            w, teacher = (None if t is None else t[kept] for t in (w, teacher))
        # -1 is the engine's own way to say "none"; a user's -1 is out of range unless it is the one to ignore
        labels = torch.where(target == -1, -2, target).masked_fill(target == ignore_index, -1)
        problem = Problem.of(x, weight, 1.0, labels=labels, names=("hidden", "weight", "targets"))
        dtype = problem.scale.dtype
        if bias is not None:
            own = check.vector("bias", bias, weight.shape[0], problem.x, dtype)
            problem = replace(problem, col_bias=own.contiguous())
        if teacher is not None and teacher_weight is not None:
            names = "teacher_hidden", "teacher_weight", "teacher_scale"
            own = check.features("teacher_weight", teacher_weight).detach()
            problem = problem.beside("teacher", names, teacher, own, 1.0, x.shape[0])
        assert problem.target is not None
        known = (problem.target >= 0).to(dtype)
        return cls(problem, known if w is None else known * w.to(dtype), kept, shape)

    def spread(self, losses: Tensor) -> Tensor:
        """Losses `[n]` times their weights, each where its token stands, 0 for those left out."""
        losses = losses * self.weights
        if self.kept is not None:
            losses = losses.new_zeros(self.shape.numel()).index_put((self.kept,), losses)
        return losses.reshape(self.shape)


def _counting(target: Tensor, words: int, ignore_index: int) -> Tensor:
    """Which targets count; what is neither a word nor to be ignored is an error, where that can be seen."""
    counts = target != ignore_index
    outside = counts & ((target < 0) | (target >= words))
    if check.readable(outside) and bool(outside.any()):
        at = int(outside.int().argmax())
        wanted = f"wanted indices in [0, {words}), or ignore_index = {ignore_index}"
        raise ValueError(f"targets: got {int(target[at])} at index {at} of {target.shape[0]} tokens, {wanted}")
    return counts


def shifted(
    hidden: Tensor, tokens: Tensor, pad_id: int | None, prompt_lengths: Tensor | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """States and their targets, the tokens one later with `shift`, what is padding or prompt ignored."""
    check.flag("shift", shift)
    check.tokens("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, wanted [..., T, H]")
    shape = hidden.shape[:-1]
    targets = check.whole_numbers("tokens", tokens, shape, hidden)
    if pad_id is not None:
        targets = targets.masked_fill(targets == check.whole("pad_id", pad_id), ignore_index)
    if prompt_lengths is not None:
        lengths = check.whole_numbers("prompt_lengths", prompt_lengths, shape[:-1], hidden)
        place = torch.arange(shape[-1], device=targets.device)
        targets = targets.masked_fill(place < lengths[..., None], ignore_index)
    return (hidden[..., :-1, :], targets[..., 1:]) if shift else (hidden, targets)
