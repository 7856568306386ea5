"""Which options a loss has, and which of them it refuses together: found by trying all pairs on a small batch."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from fastvlm_loss import backend, filters
from fastvlm_loss.losses import LossSpec, parameters
from fastvlm_loss.losses._batch import Options
from fastvlm_loss.testing import Case, inputs

__all__ = ["SHARED", "refusals", "table"]

SIZE = 4
SHARED = ("logit_bias", *typing.get_type_hints(Options), "positives", "label_smoothing")
VECTORS = ("image_weights", "text_weights", "token_weights", "text_relevance")
NUMBERS = {"label_smoothing": 0.1, "tau_plus": 0.1, "alpha_pos": 0.5, "teacher_scale": 2.0, "normalizer": 2.0}


def table(specs: list[LossSpec]) -> str:
    """Which loss has which of the options that several have."""
    rows = [f"| | {' | '.join(f'`{name}`' for name in SHARED)} |", f"|---|{':-:|' * len(SHARED)}"]
    for spec in specs:
        rows.append(f"| `{spec.name}` | {' | '.join('✓' if spec.takes(name) else '' for name in SHARED)} |")
    return "\n".join(rows)


def refusals(spec: LossSpec) -> list[str]:
    """The errors of pairs of options each of which is right alone, in order, each once."""
    needed = {name: p.default is p.empty for name, p in parameters(spec.function).items()}
    tensors, given = inputs(spec, Case(SIZE, SIZE, dtype=torch.float64, options=spec.variants[0]))
    base = {**tensors, **{k: v for k, v in given.items() if needed[k]}}
    tried = [{name: value} for name in needed if not needed[name] for value in _values(spec, name)]
    found: dict[str, None] = {}
    right = []
    for options in tried:
        error = _error(spec, {**base, **options})
        if error:  # one that wants another beside it
            found[error] = None
            beside = (o for o in tried if not o.keys() & options.keys())
            options = next((c for o in beside if not _error(spec, {**base, **(c := {**options, **o})})), {})
        right.append(options)
    for k, one in enumerate(right):
        for other in right[:k]:
            clash = any(one[name] is not other[name] for name in one.keys() & other.keys())
            if not clash and (error := _error(spec, {**base, **other, **one})):
                found[error] = None
    return list(found)


def _values(spec: LossSpec, name: str) -> list[Any]:
    """Values of an option that are no default."""
    made = {
        "labels": torch.arange(SIZE), "image_ids": torch.arange(SIZE), "text_ids": torch.arange(SIZE),
        "prompt_lengths": torch.ones((), dtype=torch.int64), "pad_id": 0,
        "bias": torch.zeros(SIZE).double(), "logit_bias": -1.0,
        "filters": filters.absolute(0.1),
        **dict.fromkeys(VECTORS, torch.ones(SIZE).double()),
        **({"text_relevance": torch.ones(SIZE, spec.tokens[1]).double()} if spec.tokens else {}),
        **dict.fromkeys(("teacher_hidden", "teacher_weight"), torch.eye(SIZE).double()), **NUMBERS,
    }  # fmt: skip
    if name in made:
        guide = [filters.guide(torch.eye(SIZE).double(), torch.eye(SIZE).double())] if name == "filters" else []
        return [made[name], *guide]
    parameter = parameters(spec.function)[name]
    kind = typing.get_type_hints(spec.function).get(name, parameter.annotation)
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    choices = choices or next((typing.get_args(k) for k in typing.get_args(kind) if typing.get_args(k)), ())
    if kind is bool:
        return [not parameter.default]
    return [c for c in choices if isinstance(c, str) and c != parameter.default]


def _error(spec: LossSpec, arguments: Mapping[str, Any]) -> str:
    with warnings.catch_warnings(), backend("torch"):
        warnings.simplefilter("ignore")
        try:
            spec.function(**arguments)
        except (TypeError, ValueError) as error:
            return str(error)
    return ""
