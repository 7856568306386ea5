"""For pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.baselines import contestants
from benchmarks.measure import BOTH, features, step
from benchmarks.work import work
from fastvlm_loss.losses import registry

CASES = [(loss, name) for loss in registry for name in contestants(registry[loss])[0]]


@pytest.mark.parametrize("n", [256, 2048])
@pytest.mark.parametrize(("loss", "name"), CASES)
def test_forward_and_backward(benchmark: Any, loss: str, name: str, n: int) -> None:
    """One contestant at one batch, D = 512, fp32."""
    benchmark.group = f"{loss}, N = {n}"
    tensors = features(n, 512, torch.float32, "cpu", work(loss).bias)
    benchmark(step, contestants(registry[loss])[0][name], tensors, BOTH)
