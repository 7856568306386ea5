"""Late interaction in the engine: its variants within the error budgets, gradcheck, tiles, compilation, memory."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from late_interaction_cases import assert_same, gradients, leaves, sets, some

import fastvlm_loss
from benchmarks.memory import ALLOCATOR
from fastvlm_loss import late_interaction_loss
from fastvlm_loss.backends import interaction as chunked
from fastvlm_loss.engine.interaction_ops import GRADIENT, STATISTICS
from fastvlm_loss.losses import documented, registry
from fastvlm_loss.scores.interaction import Interaction, Tokens
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Softmax
from fastvlm_loss.testing import Case, evaluate, inputs, poison, violations

pytestmark = pytest.mark.usefixtures("one_thread")  # small tensors
ROOT = Path(__file__).parents[1]
SPEC = documented["late_interaction_loss"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def rounds_again(options, dtype):
    return options.get("normalize") and dtype.itemsize == 2


@by_dtype
@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_variants(m, backend, dtype):
    found = []
    for k, options in enumerate(SPEC.variants):
        if not rounds_again(options, dtype):
            d, bias = ((8, None), (100, -3.0))[(k + m) % 2]
            case = Case(m=m, d=d, dtype=dtype, bias=bias, options=options, backend=backend, seed=k)
            with poison():
                found += violations(SPEC, case)
    assert not found


@pytest.mark.gpu
@by_dtype
def test_variants_on_a_gpu(dtype, monkeypatch):
    monkeypatch.setitem(chunked.TILE, "cuda", 5000)
    found = []
    for k, options in enumerate(SPEC.variants):
        if not rounds_again(options, dtype):
            case = Case(m=70, d=64, dtype=dtype, device="cuda", options=options, seed=k)
            with poison():
                found += violations(SPEC, case)
    assert not found


@by_dtype
def test_several_tiles(dtype, monkeypatch):
    monkeypatch.setitem(chunked.TILE, "cpu", 5000)
    found = [violations(SPEC, Case(m=70, d=64, dtype=dtype, options=SPEC.variants[k])) for k in (0, 3)]
    assert found == [[], []]


@by_dtype
def test_scale_and_bias(dtype):
    found = []
    for scale, bias, shape in itertools.product((1e-3, 1.0, 100.0, 1e4), (None, 10.0), ((), (1,))):
        for noise in (0.2, 2.0):
            found += violations(SPEC, Case(33, 64, dtype=dtype, scale=scale, bias=bias, scale_shape=shape, noise=noise))
    assert not found


def labels_of(m, n, device, g):
    return torch.randint(-1, n, (m,), generator=g).to(device)


def row_ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (m,), generator=g).to(device)


def col_ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (n,), generator=g).to(device)


@by_dtype
@pytest.mark.parametrize(("m", "n"), [(1, 5), (5, 1), (20, 33), (33, 20)])
def test_not_square(m, n, dtype):
    found = []
    ids = {"image_ids": row_ids, "text_ids": col_ids}
    masks = {name: SPEC.variants[2][name] for name in ("image_mask", "text_mask")}
    extras = [{}, ids, masks, {**ids, **masks, "positives": "in"}, {**masks, "directions": "text", "positives": "out"}]
    for extra in (*extras, {"label_smoothing": 0.1, "interaction": "colbert", **masks}):
        found += violations(SPEC, Case(m=m, n=n, d=24, dtype=dtype, bias=1.0, options={"labels": labels_of, **extra}))
    assert not found


@pytest.mark.parametrize("k", range(len(SPEC.variants)))
def test_gradcheck(k):
    case = Case(m=5, d=3, dtype=torch.float64, scale=5.0, bias=0.5, options=SPEC.variants[k], seed=k)
    tensors, options = inputs(SPEC, case)
    g = torch.Generator().manual_seed(1)
    # off the grid, where equal products have no derivative
    off = {"image_tokens": 0.01, "text_tokens": 0.01}
    wide = [
        (
            v.detach().double() + off.get(name, 0.0) * torch.rand(v.shape, generator=g, dtype=torch.float64)
        ).requires_grad_()
        for name, v in tensors.items()
    ]
    assert torch.autograd.gradcheck(
        lambda *values: late_interaction_loss(**dict(zip(tensors, values, strict=True)), **options), wide
    )


def interaction_of(x, y, scale=7.0, **masks):
    sides = [Tokens.of(k, v, masks.get(k), None) for k, v in (("image", x), ("text", y))]
    label = None if len(x) == len(y) else torch.arange(len(x)) % len(y)
    return Interaction.of(Problem.of(x[:, 0], y[:, 0], scale, 1.0, labels=label), *sides, x, y, False)


@pytest.mark.parametrize("cells", [1, 60, 500])
def test_tile_size_does_not_matter(cells, monkeypatch):
    x, y, scale = leaves(m=9, n=7)
    how = {
        "labels": torch.arange(9) % 7,
        "image_mask": some(9, 4, 1),
        "text_mask": some(7, 3, 2),
        "label_smoothing": 0.1,
    }
    whole = gradients(late_interaction_loss(x, y, scale, **how), (x, y, scale))
    monkeypatch.setitem(chunked.TILE, "cpu", cells)
    sizes = {(r.stop - r.start, c.stop - c.start) for r, c in chunked._tiles(interaction_of(x, y))}
    assert max(a * b for a, b in sizes) <= max(cells // 12, 1)
    assert_same(gradients(late_interaction_loss(x, y, scale, **how), (x, y, scale)), whole)


def test_the_same_bits_from_run_to_run():
    tensors = leaves(m=50, p=7, t=5, d=16, dtype=torch.float32)
    runs = [gradients(late_interaction_loss(*tensors), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"labels": torch.tensor([1, 0, -1, 3, 3, 5])}])
def test_the_dense_backend_agrees_and_has_second_derivatives(options):
    x, y, scale = leaves()
    how = {**options, "image_mask": some(6, 4, 1), "text_mask": some(6, 3, 2).index_fill(0, torch.tensor(4), False)}
    got = gradients(late_interaction_loss(x, y, scale, **how), (x, y, scale))
    with fastvlm_loss.backend("dense"):
        loss = late_interaction_loss(x, y, scale, **how)
        assert_same(got, gradients(loss, (x, y, scale)))
        first = torch.autograd.grad(late_interaction_loss(x, y, scale, **how), x, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()
    first = torch.autograd.grad(late_interaction_loss(x, y, scale, **how), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("masks", [{}, {"image": some(9, 4, 1), "text": some(7, 3, 2)}], ids=["plain", "masks"])
@pytest.mark.parametrize("flags", [Softmax().flags, Softmax(rows=False, gap=True).flags])
def test_opcheck(masks, flags):
    x, y, _ = sets(m=9, n=7, dtype=torch.float32)
    p, statistic = interaction_of(x, y, **masks), Softmax.of(flags)
    counts = p.pairs.targets()
    targets = torch.cat(counts)[-sum(statistic.lengths(9, 7)) :]
    torch.library.opcheck(STATISTICS, (*p.tensors(), targets, flags))
    nll, gap, state = STATISTICS(*p.tensors(), targets, flags)
    for needs in ((True,) * 4, (True, False, False, True), (False, True, False, False)):
        given = (*p.tensors(), targets, state, torch.ones_like(nll), gap if statistic.gap else None, flags, *needs)
        torch.library.opcheck(GRADIENT, given)


@pytest.mark.parametrize("k", range(len(SPEC.variants)))
def test_compiles_in_one_graph(k):
    torch.compiler.reset()
    tensors, options = inputs(SPEC, Case(12, 8, options=SPEC.variants[k], bias=0.5))
    compiled = torch.compile(lambda t, o: late_interaction_loss(**t, **o), fullgraph=True, backend="aot_eager")
    got = evaluate(lambda **given: compiled({n: given[n] for n in tensors}, options), tensors, {})
    for name, want in evaluate(late_interaction_loss, tensors, options).items():
        torch.testing.assert_close(got[name], want)


def test_the_same_tensor_on_both_sides_compiles():
    x = sets()[0].requires_grad_()
    mask = some(6, 4, 1)
    loss = torch.compile(
        lambda x: late_interaction_loss(x, x, 7.0, image_mask=mask, text_mask=mask), fullgraph=True, backend="aot_eager"
    )
    want = late_interaction_loss(x, x, 7.0, image_mask=mask, text_mask=mask)
    assert_same(gradients(loss(x), (x,)), gradients(want, (x,)))


def test_meta_tensors_have_the_right_shape():
    x, y = (torch.empty(5, k, 4, device="meta", requires_grad=True) for k in (3, 2))
    assert late_interaction_loss(x, y, 1.0).shape == () and late_interaction_loss(
        x, y, 1.0, reduction="none"
    ).shape == (5,)


def test_autocast_rounds_the_tokens_and_keeps_fp32_sums():
    x, y, scale = leaves(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = late_interaction_loss(x, y, scale)
    want = late_interaction_loss(x.bfloat16(), y.bfloat16(), scale)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    found = torch.autograd.grad(got, (x, y))
    assert all(g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize("needed", [c for k in (1, 2, 3) for c in itertools.combinations(range(5), k)])
def test_what_needs_no_gradient_changes_no_other(needed):
    tensors = [*sets(), torch.rand(6, 4).double() + 0.1, torch.rand(6, 3).double() + 0.1]
    every = [v.clone().requires_grad_() for v in tensors]

    def loss(x, y, scale, r, q):
        return late_interaction_loss(x, y, scale, image_relevance=r, text_relevance=q)

    want = gradients(loss(*every), every)[1:]
    few = [v.requires_grad_(k in needed) for k, v in enumerate(tensors)]
    got = torch.autograd.grad(loss(*few), [few[k] for k in needed])
    assert all(torch.equal(g, want[k]) for g, k in zip(got, needed, strict=True))


def test_it_is_documented_and_no_part_of_the_matrix_of_features():
    assert SPEC.name not in registry and registry.items() <= documented.items()


MEMORY = """
import json, torch
from benchmarks.memory import extra
from fastvlm_loss import late_interaction_loss
from fastvlm_loss.backends import interaction
interaction.TILE["cpu"] = 2**16
torch.set_num_threads(1)

def step(m):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(m, 2, 4, generator=g).requires_grad_() for _ in range(2))
    mask = torch.rand(m, 2, generator=g) < 0.7
    return lambda: torch.autograd.grad(late_interaction_loss(x, y, 1.0, image_mask=mask, text_mask=mask), (x, y))

step(64)()
call = step(2048)
print(json.dumps(extra(call, "cpu")[1]))
"""


def test_memory_holds_no_matrix_of_pairs():
    """The scores of all pairs alone would be 16 MB, with a number a token 32 MB, the products 64 MB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, **ALLOCATOR},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) < 8 * 2**20
