"""What the library knows of a loss: registering one adds it to the test matrix, the benchmark and the docs.

A loss on sets of tokens is only added to the docs: matrix and benchmark know sizes of features alone.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Learned", "LossSpec", "documented", "parameters", "register", "registry"]

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Learned:
    """An option of a variant with a gradient: `make(M, N, device, generator)` is its tensor."""

    make: Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    Attributes:
        function: the public function.
        oracle: the same signature on the dense score matrix, differentiable by plain autograd, any dtype.
        equation: one line, as shown in the docs.
        paper: source.
        variants: option sets that the test matrix runs, the first one also the benchmark; a callable value is called
            with (M, N, device, generator) or, if it has a fifth parameter, also with D.
        names: what the function calls its features, where not image_features and text_features.
        reduction: what the function does by default.
        not_square: options that it needs besides where M != N.
        cost: products of M x N x D that forward, and forward with backward, cannot do without unless scores are stored.
        tokens: of a loss on tokens [M, P, D] and [N, T, D], the P and T that tests take.
    """

    function: Loss
    oracle: Loss
    equation: str
    paper: str
    variants: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))
    names: Mapping[str, str] = field(default_factory=dict)
    cost: tuple[float, float] = (1, 4)
    reduction: str = "mean"
    not_square: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """The first line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def takes(self, *names: str) -> bool:
        """Whether the function has all these parameters."""
        return set(names) <= set(parameters(self.function))


registry: dict[str, LossSpec] = {}  # those that the matrix and the benchmark run
documented: dict[str, LossSpec] = {}  # all


def register(spec: LossSpec) -> LossSpec:
    """Add a loss to the registry; its name must be new."""
    if spec.name in documented:
        raise ValueError(f"register: got {spec.name!r} twice, wanted a new name")
    documented[spec.name] = spec
    if spec.tokens is None:
        registry[spec.name] = spec
    return spec


def parameters(function: Loss) -> dict[str, inspect.Parameter]:
    """Of a loss, in order, those of its `**options` included."""
    found = dict(inspect.signature(function).parameters)
    several = [name for name, p in found.items() if p.kind is p.VAR_KEYWORD]
    for name in several:
        del found[name]
        options = typing.get_args(typing.get_type_hints(function)[name])[0]
        for option, kind in typing.get_type_hints(options).items():
            found[option] = inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    return found
