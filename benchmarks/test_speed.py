"""For pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.baselines import contestants
from benchmarks.inputs import inputs
from benchmarks.measure import BOTH, step
from benchmarks.size import Size
from fastvlm_loss.losses import registry

CASES = [(loss, name) for loss in registry for name in contestants(registry[loss])[0]]


@pytest.mark.parametrize("n", [256, 2048])
@pytest.mark.parametrize(("loss", "name"), CASES)
def test_forward_and_backward(benchmark: Any, loss: str, name: str, n: int) -> None:
    """One contestant at one batch (of tokens, against as many words), D = 512, fp32."""
    benchmark.group = f"{loss}, N = {n}"
    given = inputs(registry[loss], Size.square(n, 512), torch.float32, "cpu")
    benchmark(step, contestants(registry[loss])[0][name], given, BOTH)
