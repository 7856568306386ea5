"""Run by test_kernels.py in its own process: what only the interpreter can show of the kernels' launches."""

from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

import pytest
import torch
from fastvlm_loss.kernels import configs
from interpreter import Fences, shuffled_programs
from test_gpu import (
    DTYPES,
    HARD,
    assert_same_bits,
    by_dtype,
    by_loss,
    check_hard_inputs,
    ids,
    labels,
    leaves,
    run,
    text_ids,
)
from test_matrix import rounds_again

from fastvlm_loss.backends import triton as backend
from fastvlm_loss.losses import registry
from fastvlm_loss.testing import Case, violations

LABELS = {"labels": labels, "image_ids": ids, "text_ids": text_ids, "label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Macro-tiles as small as they can be."""
    monkeypatch.setattr(backend, "_workspace", 2**12)


@contextmanager
def many_tiles(turn):
    """Tiles that a small matrix has many of, of another shape each turn."""
    tile = configs.Tile(*[(32, 64, 16, 16), (64, 32, 64, 32), (16, 128, 32, 64)][turn % 3], warps=4, stages=2)
    with configs.use("forward", tile), configs.use("gradient", tile):
        yield


@by_dtype
@pytest.mark.parametrize(("m", "n", "d"), [(3, 1, 8), (130, 257, 100), (517, 300, 40)])
@pytest.mark.parametrize("options", [{"labels": labels}, LABELS], ids=["labels", "ids"])
def test_nothing_is_read_or_written_past_an_end(m, n, d, dtype, options):
    case = Case(m, d, n, dtype=dtype, bias=1.0, options=options, backend="triton")
    with Fences() as fences:

        @wraps(registry["clip_loss"].function)
        def fenced(**given):
            return registry["clip_loss"].function(
                **{k: fences.around(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            )

        found = violations(replace(registry["clip_loss"], function=fenced), case)
    assert not found and not fences.broken()


@by_dtype
@pytest.mark.parametrize("options", [{}, LABELS], ids=["plain", "ids"])
def test_the_order_of_programs_changes_no_bit(dtype, options):
    m, n = (400, 300) if options else (400, 400)
    g = torch.Generator().manual_seed(0)
    options = {k: v(m, n, torch.device("cpu"), g) if callable(v) else v for k, v in options.items()}
    tensors = leaves(m, 64, n, dtype=dtype)
    want = run(tensors, **options)
    for seed in (0, 1):
        with shuffled_programs(seed):
            assert_same_bits(run(tensors, **options), want)


@pytest.mark.parametrize("name", HARD)
@by_loss
def test_hard_inputs_in_many_tiles(spec, name):
    turn = list(HARD).index(name)
    with many_tiles(turn // 3):
        check_hard_inputs(spec, name, DTYPES[turn % 3], 150)


@by_dtype
@by_loss
def test_variants_in_many_tiles(spec, dtype):
    found = []
    for k, options in enumerate(spec.variants):
        if (k + DTYPES.index(dtype)) % 3 == 0 and not rounds_again(options, dtype):  # each variant in one dtype
            with many_tiles(k):
                found += violations(spec, Case(150, 40, dtype=dtype, options=options, backend="triton", seed=k))
    assert not found
