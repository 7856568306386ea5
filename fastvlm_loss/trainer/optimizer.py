"""AdamW for what a stage trains: groups by decay and by when they began to learn, and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .stages import Stage

__all__ = ["Learning", "clip", "cosine"]


class Learning:
    """The optimiser of a stage.

    What already learned keeps its state, what is frozen loses it, what begins to learn starts fresh and with a warm-up
    of its own. Biases, norms, the temperature and learned weights of losses are not decayed.
    """

    def __init__(self, config: OptimizerConfig, steps: int, device: torch.device) -> None:
        self.config, self.steps, self.device = config, steps, device
        self.since: dict[str, int] = {}  # the step at which a parameter began to learn
        self.named: dict[str, Tensor] = {}
        self.optimizer: torch.optim.AdamW | None = None
        self.stage: Stage | None = None
        self.fused = False

    def begin(self, stage: Stage, named: Iterable[tuple[str, Tensor]]) -> None:
        """Train exactly these parameters from the stage's first step on."""
        before = self.state
        self.named = {name: p for name, p in named if p.requires_grad}
        self.since = {name: self.since.get(name, stage.start) for name in self.named}
        groups: dict[tuple[int, bool], list[Tensor]] = {}
        for name, p in self.named.items():
            groups.setdefault((self.since[name], p.ndim >= 2), []).append(p)
        config, fused = self.config, self.config.fused
        if fused is None:
            fused = self.device.type in ("cpu", "cuda") and not any(
                hasattr(p, "full_tensor") for p in self.named.values()
            )
        self.fused = bool(fused)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": config.weight_decay * decayed, "since": since}
                for (since, decayed), params in groups.items()
            ],
            lr=config.lr, betas=config.betas, fused=fused,
        )  # fmt: skip
        self.restore(before)
        self.stage = stage

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's tensors by the names of the parameters."""
        if self.optimizer is None:
            return {}
        return {n: dict(self.optimizer.state[p]) for n, p in self.named.items() if p in self.optimizer.state}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the tensors of those that learn now."""
        assert self.optimizer is not None
        for name, tensors in state.items():
            if name in self.named:
                self.optimizer.state[self.named[name]] = dict(tensors)

    def step(self, step: int, scaler: torch.amp.GradScaler | None = None) -> float:
        """Update with the rates of this step of the run; the rate of what learned first."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step, group["since"])
        self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        return float(self.optimizer.param_groups[0]["lr"])

    def rate(self, step: int, since: int) -> float:
        """The learning rate at a step of what learns since another."""
        assert self.stage is not None
        config = self.config
        rate = config.lr * self.stage.config.lr * cosine(step, self.steps, config.warmup, config.final)
        if since:
            warm = max(1, round(config.stage_warmup * (self.stage.end - self.stage.start)))
            rate *= min(1.0, (step - since + 1) / warm)
        return rate


def cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear to 1 over `warmup * steps` steps, then half a cosine to `final`."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The gradients' norm, before they are cut to `most` (0: not cut)."""
    given = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    if most:
        torch.nn.utils.clip_grads_with_norm_(given, most, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
