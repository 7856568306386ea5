"""What the library knows of a loss: registering one adds it to the test matrix, the benchmark and the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["LossSpec", "register", "registry"]

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    Attributes:
        function: the public function.
        oracle: the same signature on the dense score matrix, differentiable by plain autograd, any dtype.
        equation: one line, as shown in the docs.
        paper: source.
        variants: option sets that the test matrix runs; a callable value is called with (M, N, device, generator).
    """

    function: Loss
    oracle: Loss
    equation: str
    paper: str
    variants: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.function.__name__


registry: dict[str, LossSpec] = {}


def register(spec: LossSpec) -> LossSpec:
    """Add a loss to the registry; its name must be new."""
    if spec.name in registry:
        raise ValueError(f"register: got {spec.name!r} twice, wanted a new name")
    registry[spec.name] = spec
    return spec
