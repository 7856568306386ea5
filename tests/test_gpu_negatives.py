"""The selection kernel, alone and beside a loss: the indices of chunked PyTorch, exact order, what only a GPU shows.

With FASTVLM_TEST_DEVICE=cpu and TRITON_INTERPRET=1 it runs in Triton's interpreter; test_kernels.py does that.
"""

import math
import os
from contextlib import nullcontext

import pytest
import torch
from fastvlm_loss.kernels import configs

import fastvlm_loss
from fastvlm_loss import BatchNegatives, clip_loss, filters, hard_negatives, triplet_loss
from fastvlm_loss.backends import triton as backend

DEVICE = os.environ.get("FASTVLM_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
if not ON_GPU:
    import interpreter

    interpreter.install()

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
N = 1500 if ON_GPU else 90


def lattice(n, d, seed, dtype, most=2):
    """Features whose products are exact in any order of summation and in any dtype."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (n, d), generator=g).to(DEVICE, dtype)


def guided(dtype):
    return [filters.guide(lattice(N, 6, 8, dtype), lattice(N, 6, 9, dtype), margin=-3.0), filters.absolute(4.0)]


OPTIONS = {
    "drawn": lambda dtype: {},
    "uniform": lambda dtype: {"hardness": 0.0},
    "greedy": lambda dtype: {"hardness": math.inf},
    "ids": lambda dtype: {"image_ids": torch.arange(N, device=DEVICE) // 3 - 1},
    "floor": lambda dtype: {"floor": 1e-2},
    "filters": lambda dtype: {"filters": filters.relative(0.5)},
    "guide": lambda dtype: {"filters": guided(dtype)},
    "labels": lambda dtype: {"labels": torch.arange(N, device=DEVICE).flip(0) // 2},
    "far": lambda dtype: {"seed": 2**40 + 1, "step": 2**33 + 7},
}


def found(name, x, y, k, **options):
    with fastvlm_loss.backend(name):
        result = hard_negatives(x, y, k, **{"seed": 5, "step": 3, "scale": 0.2, **options})
    return result.text_index, result.image_index, result.text_score, result.image_score


@pytest.mark.parametrize("option", OPTIONS)
@by_dtype
def test_the_same_indices_as_chunked_pytorch(option, dtype):
    x, y = lattice(N, 24, 0, dtype), lattice(N, 24, 1, dtype)
    k = 5 if option != "ids" else 20
    options = OPTIONS[option](dtype)
    for got, want in zip(found("triton", x, y, k, **options), found("torch", x, y, k, **options), strict=True):
        # keys that differ by the last digit of a logarithm may change places
        differ = got != want if not got.is_floating_point() else (got - want).abs() > 1e-5
        assert float(differ.float().mean()) < 0.005


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 33, 3), (70, 130, 64), (N, N, 2)])
@by_dtype
def test_the_largest_in_order(m, n, k, dtype):
    x, y = lattice(m, 16, 0, dtype), lattice(n, 16, 1, dtype)
    labels = torch.arange(m, device=DEVICE) % n
    scores = x.float() @ y.float().T
    scores[torch.arange(m, device=DEVICE), labels] = -math.inf
    text, image, *_ = found("triton", x, y, k, hardness=math.inf, labels=labels)
    for axis, index in ((1, text), (0, image)):
        ordered = scores.sort(dim=axis, descending=True, stable=True)  # equal scores: the lowest index first
        want = ordered.indices.masked_fill(ordered.values == -math.inf, -1).movedim(axis, 1)[:, :k]
        assert torch.equal(index[:, : want.shape[1]], want) and bool((index[:, want.shape[1] :] == -1).all())


@pytest.mark.parametrize("hardness", [1.0, math.inf])
def test_any_tile_and_any_strips(hardness, monkeypatch):
    x, y = lattice(N, 16, 0, torch.bfloat16), lattice(N, 16, 1, torch.bfloat16)
    want = found("triton", x, y, 6, hardness=hardness)
    tiles = [(32, 64, 16, 64), (16, 16, 16, 16)] if not ON_GPU else [(64, 32, 16, 32), (32, 64, 16, 64)]
    for rows, cols, depth, piece in tiles:
        monkeypatch.setattr(backend, "_workspace", 2**16)
        with configs.use("select", configs.Tile(rows, cols, depth, piece, warps=4, stages=2)):
            got = found("triton", x, y, 6, hardness=hardness)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_nan_is_excluded():
    x, y = lattice(40, 8, 0, torch.float32), lattice(40, 8, 1, torch.float32)
    x[3, 1], y[5] = math.nan, math.nan
    text, image, *_ = found("triton", x, y, 39)
    assert not (text == 5).any() and not (image == 3).any()
    assert bool((text[3] == -1).all()) and bool((image[5] == -1).all())


def beside(x, y, k, hardness, options, loss=clip_loss):
    """Loss, gradients and negatives of a loss's own pass."""
    given = (10.0,) if loss is clip_loss else ()
    own = [t.clone().requires_grad_() for t in (x, y)]
    negatives = BatchNegatives(k, hardness=hardness, seed=5, step=3)
    with fastvlm_loss.backend("triton"):
        value = loss(*own, *given, negatives=negatives, **options)
        gradients = torch.autograd.grad(value, own)
    found = negatives.found
    return (value.detach(), *gradients), (found.text_index, found.image_index, found.text_score, found.image_score)


def assert_one_pass_is_two(x, y, k, hardness=1.0, options=None, loss=clip_loss, tile=None):
    with configs.use("fused", tile) if tile else nullcontext():
        numbers, picked = beside(x, y, k, hardness, options or {}, loss)
    with configs.use("fused", None):
        others, wanted = beside(x, y, k, hardness, options or {}, loss)
    for got, want in zip(picked, wanted, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(numbers, others, strict=True):
        few = max(1e-5, 4 * torch.finfo(want.dtype).eps)
        torch.testing.assert_close(got, want, rtol=few, atol=few * float(want.abs().amax()) if want.numel() else 0.0)


SHARED = {
    "pairs": lambda: {},
    "ids": lambda: {"image_ids": torch.arange(N, device=DEVICE) // 3 - 1},
    "labels": lambda: {"labels": torch.arange(N, device=DEVICE).flip(0) // 2 - 1, "label_smoothing": 0.1},
    "filters": lambda: {"filters": filters.relative(0.5)},
}


@pytest.mark.parametrize(
    ("option", "k", "hardness"),
    [
        ("pairs", 1, 1.0), ("pairs", 8, math.inf), ("ids", 3, 1.0), ("labels", 1, 1.0), ("filters", 3, math.inf),
    ],
)  # fmt: skip
def test_one_pass_for_a_loss_and_its_negatives_is_two(option, k, hardness):
    dtype = DTYPES[k % 3]
    x, y = (lattice(N, 24, s, dtype) / 8 for s in (0, 1))
    tile = None if dtype != torch.float32 else configs.Tile(64, 32, 32, 32, warps=4, stages=2)  # whatever the table has
    assert_one_pass_is_two(x, y, k, hardness, SHARED[option](), tile=tile)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (70, 33), (0, 5), (5, 0)])
def test_one_pass_of_any_size(m, n):
    x, y = (lattice(size, 12, s, torch.bfloat16) / 8 for s, size in enumerate((m, n)))
    labels = torch.arange(m, device=DEVICE) % n if n else torch.full((m,), -1, device=DEVICE)
    assert_one_pass_is_two(x, y, 3, options={"labels": labels})


def test_one_pass_beside_hinges():
    x, y = (lattice(60, 16, s, torch.float16) / 8 for s in (0, 1))
    assert_one_pass_is_two(x, y, 2, loss=triplet_loss)


def test_one_pass_is_one_launch_a_strip(monkeypatch):
    class Counted:
        def __init__(self, name):
            self.kernel, self.launches = getattr(backend, name), 0
            monkeypatch.setattr(backend, name, self)

        def __getitem__(self, grid):
            self.launches += 1
            return self.kernel[grid]

    rows = 64 if ON_GPU else 16
    m, n, tile = 5 * rows + 10, 40, configs.Tile(rows, 32, 16, 32, warps=4, stages=2)
    x, y = (lattice(size, 16, s, torch.bfloat16) / 8 for s, size in enumerate((m, n)))
    forward, select = Counted("forward_kernel"), Counted("select_kernel")
    with configs.use("select", tile):
        assert_one_pass_is_two(x, y, 3, math.inf, {"labels": torch.arange(m, device=DEVICE) % n}, tile=tile)
    assert (forward.launches, select.launches) == (1, 2 + 2)  # four blocks of rows, then the rest; and beside forward


def test_beside_a_loss():
    x, y = (lattice(70, 16, s, torch.bfloat16) / 8 for s in (0, 1))
    with fastvlm_loss.backend("triton"):
        negatives = BatchNegatives(3, scale=2.0, seed=1, step=2)
        loss = clip_loss(x, y, 10.0, negatives=negatives)
        alone = hard_negatives(x, y, 3, scale=2.0, seed=1, step=2)
        torch.testing.assert_close(loss, clip_loss(x, y, 10.0), rtol=1e-6, atol=1e-6)
    assert torch.equal(negatives.found.text_index, alone.text_index)
    assert torch.equal(negatives.found.image_index, alone.image_index)


@gpu_only
def test_nothing_waits_for_the_gpu():
    x, y = lattice(N, 64, 0, torch.bfloat16), lattice(N, 64, 1, torch.bfloat16)
    hard_negatives(x, y, 4, seed=0, step=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hard_negatives(x, y, 4, seed=0, step=1, image_ids=torch.arange(N, device=DEVICE) // 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_memory_is_bounded():
    x, y = lattice(20_000, 64, 0, torch.bfloat16), lattice(20_000, 64, 1, torch.bfloat16)
    hard_negatives(x, y, 8, seed=0, step=0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hard_negatives(x, y, 8, seed=0, step=1)
    # the workspace, the library's top-k of it, and the results
    assert torch.cuda.max_memory_allocated() - before < 4 * backend._workspace < 20_000**2 * 4
