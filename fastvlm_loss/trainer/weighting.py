"""Weights that follow the losses: fixed, inverse, curriculum, learned by uncertainty, GradNorm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import WeightingConfig

__all__ = ["CURRICULUM", "Weighting"]

CURRICULUM: tuple[dict[str, float], ...] = (
    {"itc": 1.0, "itm": 0.1, "mlm": 0.1, "multiscale": 0.1},
    {"itc": 1.0, "itm": 1.0, "mlm": 0.5, "multiscale": 1.0},
    {},
)
_LIMIT = 10.0  # of a log variance


class Weighting(nn.Module):
    """Joins raw losses to the one that is minimised; its parameters and buffers are part of a checkpoint.

    `fixed`: all 1, as of ALBEF and BLIP. `inverse`: w_k = K (1/l_k) / sum_j (1/l_j) of smoothed, detached losses, so
    that the gradient does not depend on the scale of any loss. `curriculum`: contrast first (matching and masked words
    .1), then masked words .5, then all 1. `uncertainty`: exp(-s_k) L_k + s_k / 2 with learned s_k. `gradnorm`: learned
    weights that make all objectives train at a like pace.

    Args:
        tasks: the run's objectives; state is kept for these.

    Source: Kendall et al. 2018, equation 10 (classification form); Chen et al. 2018 (GradNorm), algorithm 1.
    """

    smoothed: Tensor
    first: Tensor
    balance: Tensor

    def __init__(self, config: WeightingConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        self.config, self.tasks = config, tuple(tasks)
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks))) if config.kind == "uncertainty" else None
        self.register_buffer("smoothed", torch.full((len(self.tasks),), torch.nan))
        self.register_buffer("first", torch.full((len(self.tasks),), torch.nan))
        self.register_buffer("balance", torch.ones(len(self.tasks)))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Take note of this step's raw losses, the mean over all processes, before `factors` of the step."""
        for task, loss in losses.items():
            k, value = self.tasks.index(task), loss.detach().float()
            d = self.config.decay
            self.smoothed[k] = torch.where(self.smoothed[k].isnan(), value, d * self.smoothed[k] + (1 - d) * value)
            self.first[k] = torch.where(self.first[k].isnan(), value, self.first[k])

    def factors(self, tasks: Sequence[str], share: float) -> dict[str, Tensor]:
        """What each raw loss counts, `share` of the run being done; a tensor with a gradient where it is learned."""
        kind, index = self.config.kind, [self.tasks.index(t) for t in tasks]
        if kind == "inverse":
            known = self.smoothed[index]
            if bool(known.isnan().any()):  # the first step of an objective
                return dict.fromkeys(tasks, known.new_ones(()))
            inverse = 1 / known.clamp(min=self.config.floor)
            w = (len(tasks) * inverse / inverse.sum()).clamp(max=self.config.cap)
        elif kind == "uncertainty":
            assert self.log_variance is not None
            w = (-self.log_variance[index].clamp(-_LIMIT, _LIMIT)).exp()
        elif kind == "gradnorm":
            w = self.balance[index] * len(tasks) / self.balance[index].sum()
        else:
            w = self.smoothed.new_tensor([self._planned(task, share) for task in tasks])
        return dict(zip(tasks, w, strict=True))

    def regularizer(self, tasks: Sequence[str]) -> Tensor | None:
        """What `uncertainty` adds to the loss: sum s_k / 2."""
        if self.log_variance is None:
            return None
        return self.log_variance[[self.tasks.index(t) for t in tasks]].clamp(-_LIMIT, _LIMIT).sum() / 2

    @torch.no_grad()
    def rebalance(self, norms: Mapping[str, Tensor]) -> None:
        """A step of GradNorm, from the norms of the weighted objectives' gradients at the shared features."""
        index = [self.tasks.index(t) for t in norms]
        g = torch.stack([n.float() for n in norms.values()])
        pace = self.smoothed[index] / self.first[index].clamp(min=1e-12)
        target = g.mean() * (pace / pace.mean()) ** self.config.power
        # d|G_k - target_k| / d log w_k = sign(G_k - target_k) G_k, the target held: in logarithms w stays positive
        w = self.balance[index] * (-self.config.lr * (g - target).sign() * g / g.mean().clamp(min=1e-12)).exp()
        self.balance[index] = w * len(index) / w.sum()

    def _planned(self, task: str, share: float) -> float:
        if self.config.kind != "curriculum":
            return 1.0
        phase = sum(share >= b for b in self.config.boundaries)
        return CURRICULUM[phase].get(task, 1.0)
