"""The gate before the clock: no time is reported for a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm_loss import backend
from fastvlm_loss.losses import LossSpec
from fastvlm_loss.testing import Case, evaluate, inputs

from .baselines import DENSE, on_backend

__all__ = ["Verdict", "gate"]

ULPS = 4
DRAWS = 8  # the error of one scalar is luck, the worst of several is not


@dataclass(frozen=True)
class Verdict:
    """Worst error of the loss and each gradient, relative to its largest value, and what was allowed."""

    contestant: str
    dtype: str
    n: int
    d: int
    errors: dict[str, float]
    budgets: dict[str, float]
    raised: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and every error is within its budget; NaN is not."""
        return not self.raised and all(self.errors[name] <= self.budgets[name] for name in self.errors)

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        over = [name for name, error in self.errors.items() if not error <= self.budgets[name]]
        told = [f"{name} off by {self.errors[name]:.1e}, allowed {self.budgets[name]:.1e}" for name in over]
        return self.raised or f"wrong at {self.n} x {self.d}: {'; '.join(told)}"

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "passed": self.passed}


def gate(
    spec: LossSpec, losses: Mapping[str, Callable[..., Tensor]], dtype: torch.dtype, device: str,
    small: tuple[int, int], moderate: tuple[int, int],
) -> Iterator[Verdict]:  # fmt: skip
    """Judge every contestant at both sizes.

    The reference is fp64 on the rounded inputs: the loss's oracle at the small size, the dense backend at the moderate
    one. Allowed is twice the error of the dense loss in the same dtype (under autocast for half precision; as
    our backend and as the baseline write it), the worst of several draws, plus 4 units in the last place of the result.
    """
    for size, exact in ((small, spec.oracle), (moderate, _exact(spec))):
        cases = [inputs(Case(m=size[0], d=size[1], dtype=dtype, device=device, seed=seed))[0] for seed in range(DRAWS)]
        wanted = [evaluate(exact, {k: v.detach().double().requires_grad_() for k, v in c.items()}, {}) for c in cases]
        forms = [on_backend(spec, DENSE), *(losses[k] for k in (DENSE,) if k in losses)]
        dense = [_worst(form, cases, wanted)[0] for form in forms]
        for name, loss in losses.items():
            judged = name, str(dtype).removeprefix("torch."), *size
            try:
                errors, ulps = _worst(loss, cases, wanted)
            except (RuntimeError, TypeError, ValueError) as error:
                yield Verdict(*judged, {}, {}, raised=str(error).splitlines()[0])
                continue
            budgets = {value: 2 * max(form[value] for form in dense) + ULPS * ulps[value] for value in errors}
            yield Verdict(*judged, errors, budgets)


def _exact(spec: LossSpec) -> Callable[..., Tensor]:
    def loss(**tensors: Tensor) -> Tensor:
        with backend("dense"):
            return spec.function(**tensors)

    return loss


def _worst(
    loss: Callable[..., Tensor], cases: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    errors: dict[str, float] = {}
    ulps: dict[str, float] = {}
    for tensors, reference in zip(cases, wanted, strict=True):
        for name, value in evaluate(loss, tensors, {}).items():
            largest = reference[name].abs().max()
            if value.numel() == 1 and name != "loss":  # a sum that cancels: relative to what the loss owes to it
                largest = torch.maximum(largest, (reference["loss"] / tensors[name]).abs().max())
            error = ((value.double() - reference[name]).abs().max() / largest).item()
            # not max(): it would forget a NaN
            errors[name] = error if not error <= errors.get(name, 0.0) else errors.get(name, 0.0)
            ulps[name] = torch.finfo(value.dtype).eps
    return errors, ulps
