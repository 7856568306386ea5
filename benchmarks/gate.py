"""The gate before the clock: no time is reported for a wrong answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm_loss import backend
from fastvlm_loss.losses import LossSpec

from .adapters import said
from .baselines import DENSE, WITHOUT, on_backend
from .dense import Loss
from .inputs import Inputs, inputs
from .size import Size

__all__ = ["ULPS", "Verdict", "dense", "gate", "off", "survived"]

ULPS = 4
DRAWS = 8  # the error of one scalar is luck, the worst of several is not


@dataclass(frozen=True)
class Verdict:
    """Worst error of the loss and each gradient, relative to its largest value, and what was allowed."""

    contestant: str
    dtype: str
    size: Size
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
        return self.raised or f"wrong at {self.size.plain()}: {'; '.join(told)}"

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        found = asdict(self)
        del found["size"]
        return {**found, **self.size.row(), "passed": self.passed}


def gate(
    spec: LossSpec, losses: Mapping[str, Loss], dtype: torch.dtype, device: str, small: Size, moderate: Size
) -> Iterator[Verdict]:
    """Judge every contestant at both sizes.

    The reference is fp64 on the rounded inputs: the loss's oracle at the small size, the dense backend at the moderate
    one. Allowed is twice the error of the dense loss in the same dtype (under autocast for half precision; as
    our backend and as the baseline write it), the worst of several draws, plus 4 units in the last place of the result.
    """
    for size, exact in ((small, spec.oracle), (moderate, dense(spec))):
        cases = [inputs(spec, size, dtype, device, seed) for seed in range(DRAWS)]
        wanted = [case.double().evaluate(exact) for case in cases]
        forms = [on_backend(spec, DENSE), *(losses[k] for k in (DENSE,) if k in losses)]
        allowed = [_worst(form, cases, wanted)[0] for form in forms]
        for name, loss in losses.items():
            judged = name, str(dtype).removeprefix("torch."), size
            try:
                errors, ulps = _worst(loss, cases, wanted, WITHOUT.get(name, ()))
            except Exception as error:  # noqa: BLE001 (a peer and its compiler may raise anything)
                yield Verdict(*judged, {}, {}, raised=said(error))
                survived(name, error, device)
                continue
            budgets = {value: 2 * max(form[value] for form in allowed) + ULPS * ulps[value] for value in errors}
            yield Verdict(*judged, errors, budgets)


def dense(spec: LossSpec) -> Loss:
    """The loss on its whole score matrix, in the dtype of the features."""

    def loss(**named: Any) -> Tensor:
        with backend(DENSE):
            return spec.function(**named)

    return loss


def survived(who: str, error: Exception, device: str) -> None:
    """Go on after an error, or raise: one that the device did not survive would be blamed on everyone after it."""
    if torch.device(device).type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise RuntimeError(f"{who} left the device unusable: {said(error)}") from error


def off(value: Tensor, reference: Tensor, scalar: Tensor | None = None) -> float:
    """Largest error relative to the largest value; that of a scalar's gradient is a sum that cancels: `scalar`
    is then what the loss owes to it."""
    largest = reference.abs().max()
    if scalar is not None:
        largest = torch.maximum(largest, scalar.abs().max())
    return ((value.double() - reference).abs().max() / largest).item()


def _worst(
    loss: Loss, cases: list[Inputs], wanted: list[dict[str, Tensor]], without: tuple[str, ...] = ()
) -> tuple[dict[str, float], dict[str, float]]:
    errors: dict[str, float] = {}
    ulps: dict[str, float] = {}
    for case, reference in zip(cases, wanted, strict=True):
        for name, value in case.evaluate(loss).items():
            if name in without:
                continue
            owed = reference["loss"] / case.tensors[name] if value.numel() == 1 and name != "loss" else None
            error = off(value, reference[name], owed)
            # not max(): it would forget a NaN
            errors[name] = error if not error <= errors.get(name, 0.0) else errors.get(name, 0.0)
            ulps[name] = torch.finfo(value.dtype).eps
    return errors, ulps
