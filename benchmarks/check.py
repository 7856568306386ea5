"""The answer at one size: all of it where fp64 can hold the scores, else the loss and sampled rows of the gradients.

Sampled rows are exact: their scores, and their part of the gradient, are computed in fp64 on the rounded features, in
O(sample x N) memory. What they need of all other rows (the log-sum-exp of every row and column, the sum of all losses)
comes from one pass in chunks: products of exactly those features accumulated in fp32, summed up in fp64, and held
against fp64 on the sample. Nothing here calls the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_loss.losses import LossSpec

from .baselines import DENSE, WITHOUT, on_backend
from .dense import Loss
from .gate import ULPS, Verdict, dense, off
from .inputs import Inputs
from .memory import free

__all__ = ["Answer", "answer"]

ROWS = 64
CHUNK = 2**28  # scores held at once by the pass over all rows
SCORES = 8  # fp64 matrices that the dense loss and its gradients hold at once
MOST = 0.9  # of the free memory
SELF = 1e-4  # what fp32 sums may differ from fp64 on the sample


@dataclass(frozen=True)
class Answer:
    """fp64 values of the loss and gradients, of all rows (`rows` None) or these, and the relative errors allowed."""

    values: Mapping[str, Tensor]
    budgets: Mapping[str, float]
    rows: Tensor | None

    def how(self) -> str:
        """In words."""
        return "all rows" if self.rows is None else f"{len(self.rows)} rows"

    def judge(self, who: str, given: Inputs, got: Mapping[str, Tensor]) -> Verdict:
        """Loss and gradients of one contestant."""
        errors, budgets = {}, {}
        for name, wanted in self.values.items():
            if name in WITHOUT.get(who, ()):
                continue
            value = got[name] if self.rows is None or not got[name].ndim else got[name][self.rows]
            errors[name] = off(value, wanted, _owed(name, wanted, self.values["loss"], given.tensors))
            budgets[name] = self.budgets[name] + ULPS * torch.finfo(value.dtype).eps
        return Verdict(who, given.dtype, given.size, errors, budgets)


def answer(
    spec: LossSpec, given: Inputs, gate: Mapping[str, float], forms: Sequence[Loss] = (), full: bool | None = None
) -> Answer:
    """The answer for these inputs; `gate` are the errors that the gate allowed, below which nothing is refused here.

    Allowed is twice the error of the dense loss in the same dtype, as our backend and as `forms` write it; of sampled
    rows, that of the formula in this dtype. `full` None asks the memory.

    Raises:
        LookupError: too large for a dense loss, and no formula for the rows of this loss.
        ArithmeticError: fp64 and the pass over all rows disagree on the sample.
    """
    (m, n, _), tensors, (features, _) = given.size, given.tensors, given.features
    if full is None:
        full = 8 * SCORES * m * n < MOST * free(features.device)
    if full:
        try:
            exact = given.double().evaluate(dense(spec))
            rough = (given.evaluate(form) for form in (on_backend(spec, DENSE), *forms))
            return Answer(exact, _budgets(exact, rough, tensors, gate), None)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if spec.name not in ROW_FORMULAS:
        raise LookupError(f"{m} rows do not fit a dense loss, and no formula for sampled rows of {spec.name}")
    generator = torch.Generator().manual_seed(n)
    rows = torch.randperm(n, generator=generator)[:ROWS].sort().values.to(features.device)
    with torch.no_grad():
        formula = ROW_FORMULAS[spec.name](**{k: v.detach() for k, v in tensors.items()})
        exact = formula(rows, torch.float64)
        budgets = _budgets(exact, [formula(rows, features.dtype)], tensors, gate)
    noise = ULPS * torch.finfo(torch.float32).eps * tensors["logit_scale"].item()  # of the pass, whose scores are fp32
    return Answer(exact, {name: budget + noise for name, budget in budgets.items()}, rows)


def _budgets(
    exact: Mapping[str, Tensor], rough: Iterable[Mapping[str, Tensor]], tensors: Mapping[str, Tensor],
    gate: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """The larger of what the gate allowed and twice the worst of the rough answers."""
    found = {name: gate.get(name, 0.0) for name in exact}
    for values in rough:
        for name, wanted in exact.items():
            error = off(values[name], wanted, _owed(name, wanted, exact["loss"], tensors))
            found[name] = max(found[name], 2 * error)
    return found


def _owed(name: str, wanted: Tensor, loss: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
    return loss / tensors[name].detach() if wanted.numel() == 1 and name != "loss" else None


Formula = Callable[[Tensor, torch.dtype], dict[str, Tensor]]


def _clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Formula:
    """L = mean_i (LSE_j s_ij + LSE_j s_ji) / 2 - s_ii;  dX = scale / 2N (P + Q - 2) Y with both softmaxes P and Q."""
    x, y, scale, n = image_features, text_features, logit_scale.double(), len(image_features)
    row_lse = torch.empty(n, dtype=torch.float64, device=x.device)
    col_lse = torch.full_like(row_lse, -torch.inf)
    for part, products in _pass(x, y):
        scores = products.mul_(logit_scale)
        row_lse[part] = scores.logsumexp(1).double()
        torch.logaddexp(col_lse, scores.logsumexp(0).double(), out=col_lse)
    loss = ((row_lse + col_lse) / 2 - scale * _paired(x, y)).mean()

    def side(own: Tensor, other: Tensor, own_lse: Tensor, other_lse: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
        scores = _products(own[rows], other, kind) * scale.to(_wide(kind))
        exact = scores.logsumexp(1)
        if kind == torch.float64 and not torch.allclose(exact, own_lse[rows], rtol=SELF, atol=SELF):
            raise ArithmeticError("the reference disagrees with itself: log-sum-exp of the sampled rows in fp64")
        g = (scores - exact[:, None]).exp_() + (scores - other_lse.to(scores.dtype)).exp_()
        g[torch.arange(len(rows), device=rows.device), rows] -= 2
        return _weighted(g, other, kind) * (scale / (2 * n))

    def formula(rows: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
        return {
            "loss": loss,
            "image_features": side(x, y, row_lse, col_lse, rows, kind),
            "text_features": side(y, x, col_lse, row_lse, rows, kind),
        }

    return formula


def _siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Formula:
    """L = 1/N sum_ij softplus(s_ij) - mean_i s_ii;  dX = scale / N (sigmoid(s) - 1) Y."""
    x, y, n = image_features, text_features, len(image_features)
    scale, bias = logit_scale.double(), logit_bias.double()
    sums = torch.empty(n, dtype=torch.float64, device=x.device)
    for part, products in _pass(x, y):
        sums[part] = F.softplus(products.mul_(logit_scale).add_(logit_bias)).sum(1, dtype=torch.float64)
    loss = (sums - scale * _paired(x, y) - bias).mean()

    def side(own: Tensor, other: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
        scores = _products(own[rows], other, kind) * scale.to(_wide(kind)) + bias.to(_wide(kind))
        if kind == torch.float64 and own is x and not torch.allclose(F.softplus(scores).sum(1), sums[rows], rtol=SELF):
            raise ArithmeticError("the reference disagrees with itself: losses of the sampled rows in fp64")
        g = scores.sigmoid_()
        g[torch.arange(len(rows), device=rows.device), rows] -= 1
        return _weighted(g, other, kind) * (scale / n)

    def formula(rows: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
        sides = {"image_features": side(x, y, rows, kind), "text_features": side(y, x, rows, kind)}
        return {"loss": loss, **sides}

    return formula


ROW_FORMULAS: dict[str, Callable[..., Formula]] = {"clip_loss": _clip, "siglip_loss": _siglip}


def _pass(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Products of all pairs in fp32, some rows at a time."""
    on_tensor_cores: dict[str, Any] = {"out_dtype": torch.float32}
    half = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)
    for start in range(0, len(x), rows := max(CHUNK // len(y), 1)):
        part = slice(start, start + rows)
        yield part, torch.mm(x[part], y.T, **on_tensor_cores) if half else x[part].float() @ y.float().T


def _paired(x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.split(65536), y.split(65536), strict=True)
    return torch.cat([torch.linalg.vecdot(a.double(), b.double()) for a, b in parts])


def _products(own: Tensor, other: Tensor, kind: torch.dtype) -> Tensor:
    """As a dense loss of this dtype makes them."""
    return (own.to(kind) @ other.to(kind).T).to(_wide(kind))


def _weighted(g: Tensor, other: Tensor, kind: torch.dtype) -> Tensor:
    return (g.to(kind) @ other.to(kind)).double()


def _wide(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind == torch.float64 else torch.float32
