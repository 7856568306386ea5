"""Multi-scale matching in the engine: dtypes, chunks, determinism, operators, compilation, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from multiscale_cases import IMAGE, TEXT, assert_same, by_mode, formula, gradients, inputs

import fastvlm_loss
from benchmarks.memory import ALLOCATOR
from fastvlm_loss import ITMBatch, multiscale_itm, multiscale_itm_loss
from fastvlm_loss.backends import pair_products as chunked
from fastvlm_loss.engine.pair_products import GRADIENT, PRODUCTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[2**20, 30], ids=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, "cpu", request.param)


@by_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_within_the_budget(mode, dtype, chunks):
    """Twice the error of the formula in fp32 and a few units in the last place, against fp64 on the rounded inputs."""
    x, y, r, mask = inputs(b=9, p=20, d=48, n=9, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    image, text = torch.randint(0, 9, (60,), generator=g), torch.randint(0, 9, (60,), generator=g)
    w = torch.randn(60, generator=g)

    def dense(kind):
        a, b, q = (t.detach().to(kind).requires_grad_() for t in (x, y, r))
        c = torch.einsum("kpd,kd->kp", a[image], b[text])
        return gradients(w.to(kind) * formula(c, q[image], mode, mask[image]), (a, b, q))

    got = multiscale_itm(x, y, r, image_index=image, text_index=text, mode=mode, patch_mask=mask)
    found = gradients(w * got.scores, (x, y, r))
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype, torch.float32]
    for value, exact, single in zip(found, dense(torch.float64), dense(torch.float32), strict=True):
        size, eps = exact.abs().amax(), torch.finfo(value.dtype).eps
        budget = 2 * (single - exact).abs().amax() + 4 * (eps + torch.finfo(torch.float32).eps) * size
        assert (value - exact).abs().amax() <= budget


def test_the_same_bits_from_run_to_run():
    x, y, r, mask = inputs(b=20, p=30, d=16, n=20, dtype=torch.float32)
    image, text = torch.randint(0, 3, (400,)), torch.randint(0, 3, (400,))
    runs = [
        gradients(multiscale_itm(x, y, r, image_index=image, text_index=text, patch_mask=mask).scores, (x, y, r))
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_needs_no_gradient_changes_no_other(needed):
    tensors = list(inputs()[:3])
    how = {"image_index": IMAGE, "text_index": TEXT}
    want = gradients(multiscale_itm(*tensors, **how).scores, tensors)[1:]
    few = [t.detach().requires_grad_(k in needed) for k, t in enumerate(tensors)]
    got = torch.autograd.grad(multiscale_itm(*few, **how).scores.sum(), [few[k] for k in needed])
    assert all(torch.equal(g, want[k]) for g, k in zip(got, needed, strict=True))


def test_backends_and_second_derivatives():
    x, y, r, mask = inputs()
    how = {"image_index": IMAGE, "text_index": IMAGE, "patch_mask": mask}
    got = gradients(multiscale_itm(x, y, r, **how).scores, (x, y, r))
    with fastvlm_loss.backend("dense"):
        assert_same(got, gradients(multiscale_itm(x, y, r, **how).scores, (x, y, r)))
        first = torch.autograd.grad(multiscale_itm(x, y, r, **how).scores.sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()
    first = torch.autograd.grad(multiscale_itm(x, y, r, **how).scores.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.sum().backward()
    with fastvlm_loss.backend("cpp"), pytest.raises(ValueError, match="backend: got 'cpp' for pairs of patches"):
        multiscale_itm(x, y, r, **how)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", [(None, None), (IMAGE, TEXT), (IMAGE[:7], None)])
def test_opcheck(pairs, masked):
    x, y, _, mask = inputs(dtype=torch.float32)
    given = (x.detach(), y.detach()[: 5 if pairs[0] is None else 7], ~mask if masked else None, *pairs)
    torch.library.opcheck(PRODUCTS, given)
    d = torch.ones_like(PRODUCTS(*given))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(GRADIENT, (*given, d, *needs))


@by_mode
def test_it_compiles_in_one_graph(mode):
    torch.compiler.reset()
    x, y, r, mask = inputs(dtype=torch.float32)
    pairs = ITMBatch(IMAGE, TEXT, torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]), torch.ones(8))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -5.0))
    tensors = x, y, scale, bias, r

    def loss(x, y, scale, bias, r):
        return multiscale_itm_loss(x, y, pairs, scale, bias, patch_relevance=r, mode=mode, patch_mask=mask)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled(*tensors), tensors), gradients(loss(*tensors), tensors), rtol=1e-5, atol=1e-6)


def test_meta_tensors_have_the_right_shape():
    x, y, r = (torch.empty(s, device="meta", requires_grad=True) for s in ((5, 3, 4), (5, 4), (5, 3)))
    scores, valid = multiscale_itm(x, y, r)
    assert scores.shape == valid.shape == (5,) and scores.device.type == "meta"


MEMORY = """
import json, torch
from benchmarks.memory import extra
from fastvlm_loss import ITMBatch, multiscale_itm_loss
from fastvlm_loss.backends import pair_products
pair_products.CHUNK["cpu"] = 2**18
torch.set_num_threads(1)

def step(b, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, 32, 64, generator=g).to(dtype).requires_grad_()
    y = torch.randn(b, 64, generator=g).to(dtype).requires_grad_()
    r = torch.rand(b, 32, generator=g).requires_grad_()
    image, text = (torch.randint(0, b, (6 * b,), generator=g) for _ in range(2))
    pairs = ITMBatch(image, text, image % 2, torch.ones(6 * b))
    return lambda: torch.autograd.grad(multiscale_itm_loss(x, y, pairs, patch_relevance=r), (x, y, r))

for dtype in (torch.float32, torch.bfloat16):
    step(8, dtype)()
    call = step(1024, dtype)
    print(json.dumps(extra(call, "cpu")[1]))
"""


def test_memory_holds_no_patches_of_pairs():
    """Gathered once a pair, the patches alone would be 48 MiB (24 MiB in bf16); n P numbers are 0.75 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, **ALLOCATOR},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert max(map(json.loads, run.stdout.split())) < 8 * 2**20
