"""Every option of the engine's verbs in fp64 on the torch backend equals the dense score matrix, tile by tile."""

import itertools

import pytest
import torch
from engine_cases import CASES, answer, targets, tensors

from fastvlm_loss.backends import torch as chunked


@pytest.mark.parametrize("kind", ["paired", "ids", "labels", "labels and ids"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_score_matrix(case, kind, monkeypatch):
    monkeypatch.setitem(chunked.TILE, "cpu", 5)  # several tiles each way
    m, n = (11, 11) if kind in ("paired", "ids") else (11, 13)
    made, given = tensors(m, n, 6, 4), targets(kind, m, n)
    for directions, hardest in itertools.product(((True, True), (True, False), (False, True)), (False, True)):
        want, got = (
            answer(name, made, case, given, directions=directions, hardest=hardest) for name in ("dense", "torch")
        )
        assert want.keys() == got.keys()
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], rtol=1e-11, atol=1e-12, msg=lambda s, k=key: f"{k}: {s}")
