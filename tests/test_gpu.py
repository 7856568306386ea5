"""The Triton kernels on a GPU: the loss matrix, inputs made to break them, and what only a GPU can show.

With FASTVLM_TEST_DEVICE=cpu and TRITON_INTERPRET=1 the numerics run in Triton's interpreter; test_kernels.py does that.
"""

import inspect
import itertools
import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_matrix import needed, rounds_again

import fastvlm_loss
from fastvlm_loss import clip_loss
from fastvlm_loss.backends import triton as backend
from fastvlm_loss.engine.dispatch import resolve
from fastvlm_loss.engine.ops import GRADIENT, STATISTICS, SWEEP
from fastvlm_loss.losses import registry
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Softmax
from fastvlm_loss.testing import Case, evaluate, poison, violations

DEVICE = os.environ.get("FASTVLM_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
if not ON_GPU:
    import interpreter

    interpreter.install()

SPECS = list(registry.values())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = (1, 2, 7, 64, 129, 1000, 4097) if ON_GPU else (1, 2, 7, 64, 129, 300, 517)
DEPTHS = (100,) if ON_GPU else (8, 64, 100)  # a GPU compiles for each

by_loss = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def leaves(m, d=64, n=None, dtype=torch.bfloat16, scale=14.3, seed=0, device=DEVICE):
    """Features of pairs and a scale, that require gradients."""
    g = torch.Generator().manual_seed(seed)
    y = F.normalize(torch.randn(m if n is None else n, d, generator=g), dim=1)
    x = F.normalize(y[torch.arange(m) % len(y)] + 2 * torch.randn(m, d, generator=g) / d**0.5, dim=1)
    tensors = x.to(device, dtype), y.to(device, dtype), torch.full((), scale, device=device)
    return [t.requires_grad_() for t in tensors]


def run(tensors, **options):
    """Loss and gradients, by the Triton kernels."""
    with fastvlm_loss.backend("triton"):
        loss = clip_loss(*tensors, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]


def assert_same_bits(a, b):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right), f"{(left.double() - right.double()).abs().max():.2e}"


def assert_near(got, want, relative):
    """Every tensor within a part of its own largest value."""
    for a, b in zip(got, want, strict=True):
        error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        assert error <= relative * size, f"error {error:.2e}, largest value {size:.2e}"


def accepts(spec, options):
    return spec.takes(*options) and set(options) <= set(inspect.signature(spec.oracle).parameters)


def ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (m,), generator=g).to(device)


def text_ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (n,), generator=g).to(device)


def labels(m, n, device, g):
    return torch.randint(-1, n, (m,), generator=g).to(device)


def weights(m, n, device, g):
    return torch.rand(m, generator=g).masked_fill(torch.rand(m, generator=g) < 0.2, 0.0).to(device)


@gpu_only
def test_auto_takes_the_kernels():
    for dtype in (*DTYPES, torch.float64):
        x = torch.ones(3, 8, device=DEVICE, dtype=dtype)
        assert resolve(Problem.of(x, x, 5.0), Softmax()) == ("torch" if dtype == torch.float64 else "triton")
    assert "live" in fastvlm_loss.engine.dispatch.report()["triton"]
    case = Case(m=100, d=64, dtype=torch.bfloat16, device=DEVICE)
    assert not violations(registry["clip_loss"], case)


@by_dtype
@pytest.mark.parametrize("m", SIZES)
@by_loss
def test_variants(spec, m, dtype):
    found = []
    for k, options in enumerate(spec.variants):
        if rounds_again(options, dtype):
            continue
        if ON_GPU and dtype != torch.bfloat16 and k not in (0, 3):
            continue  # the same kernels, and each takes seconds to compile
        place = k + DTYPES.index(dtype) + SIZES.index(m)
        if not ON_GPU and (place % 3 or (m > 129 and place % 2)):
            continue  # each variant in one dtype: the interpreter takes seconds too
        d = DEPTHS[(k + (0 if ON_GPU else SIZES.index(m))) % len(DEPTHS)]
        case = Case(
            m, d, dtype=dtype, device=DEVICE, bias=(None, -3.0)[k % 2], options=options, backend="triton", seed=k
        )
        with poison():
            found += violations(spec, case)
    assert not found


@by_dtype
@pytest.mark.parametrize(("m", "n"), [(1, 5), (5, 1), (40, 129), (129, 40), (300, 90)] + ON_GPU * [(3001, 1537)])
@by_loss
def test_not_square(spec, m, n, dtype):
    found = []
    both = {"image_ids": ids, "text_ids": text_ids}
    for k, more in enumerate(
        ({}, both, {"label_smoothing": 0.1, "directions": "text"}, {**both, "image_weights": weights})
    ):
        options = {"labels": labels, **more}
        if accepts(spec, options):
            options = {**needed(spec, m == n), **options}
            case = Case(m, 64, n, dtype=dtype, device=DEVICE, bias=1.0, options=options, backend="triton", seed=k)
            found += violations(spec, case)
    assert not found


@by_dtype
@by_loss
def test_scale_and_bias(spec, dtype):
    found = []
    for k, (scale, bias, shape) in enumerate(itertools.product((1e-3, 1.0, 100.0, 1e4), (None, 10.0), ((), (1,)))):
        if not ON_GPU and (k + DTYPES.index(dtype)) % 3:
            continue
        case = Case(
            65, 64, dtype=dtype, device=DEVICE, scale=scale, bias=bias, scale_shape=shape,
            noise=2.0 if shape else 0.2, backend="triton", options=needed(spec),
        )  # fmt: skip
        found += violations(spec, case)
    assert not found


def _apart(x, y):
    y[::2], y[1::2], x[:] = x[0].clone(), -x[0], x[0].clone()


def _half_zero(x, y):
    x[: len(x) // 2], y[: len(y) // 2] = 0, 0


def _ramp(x, y):
    # each further column scores higher
    y[:] = x[:1] * torch.linspace(0, 1, len(y), dtype=y.dtype)[:, None]
    x[:] = x[:1].clone()


def _magnitudes(features):
    features *= 2.0 ** (torch.arange(len(features)) % 13 - 10)[:, None]


def _one_big(features):
    features[len(features) // 2] *= 40


def _keep_one(m):
    return torch.where(torch.arange(m) == m // 2, 3, -1)


# what is done to unit features, then scale, bias and options
HARD = {
    "magnitudes of rows": (lambda x, y: _magnitudes(x), 30.0, None, {}),
    "magnitudes of columns": (lambda x, y: _magnitudes(y), 30.0, None, {}),
    "one huge row": (lambda x, y: _one_big(x), 30.0, None, {}),
    "one huge column": (lambda x, y: _one_big(y), 30.0, None, {}),
    "one huge row, text direction": (lambda x, y: _one_big(x), 30.0, None, {"directions": "text"}),
    "one huge column, image direction": (lambda x, y: _one_big(y), 30.0, None, {"directions": "image"}),
    "not normalised": (lambda x, y: (x.mul_(8), y.mul_(8)), 14.3, None, {}),
    "all equal": (lambda x, y: (x.fill_(0.125), y.fill_(0.125)), 100.0, None, {}),
    "zero rows": (lambda x, y: x[::3].zero_(), 100.0, None, {}),
    "only zeros": (lambda x, y: (x.zero_(), y.zero_()), 100.0, None, {}),
    "scores far apart": (_apart, 1e3, None, {}),
    "a block of zeros": (_half_zero, 300.0, None, {}),
    "a block of zeros, smoothed": (_half_zero, 300.0, None, {"label_smoothing": 0.3}),
    "rising columns": (_ramp, 500.0, None, {}),
    "falling columns": (lambda x, y: (_ramp(x, y), y.neg_()), 500.0, None, {}),
    "rising rows": (lambda x, y: _ramp(y, x), 500.0, None, {}),
    "falling rows": (lambda x, y: (_ramp(y, x), x.neg_()), 500.0, None, {}),
    "the target is worst": (lambda x, y: x.copy_(-y), 50.0, None, {}),
    "the target is certain": (lambda x, y: x.copy_(y), 1e3, None, {}),
    "a low level": (lambda x, y: None, 10.0, -1e4, {}),
    "a high level": (lambda x, y: None, 10.0, 1e4, {"label_smoothing": 0.1}),
    "no candidate but the target": (lambda x, y: None, 10.0, None, {"image_ids": lambda m: torch.full((m,), 7)}),
    "one pair is left": (lambda x, y: None, 10.0, None, {"image_ids": _keep_one}),
    "nothing is left": (lambda x, y: None, 10.0, None, {"image_ids": lambda m: torch.full((m,), -1)}),
}


def check_hard_inputs(spec, name, dtype, m):
    """Values and gradients within twice the error of the dense loss in fp32 and a few units of the largest score."""
    change, scale, bias, options = HARD[name]
    x, y, _ = leaves(m, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        change(x, y)
    tensors = {
        "image_features": x.detach().to(DEVICE, dtype).requires_grad_(),
        "text_features": y.detach().to(DEVICE, dtype).requires_grad_(),
        "logit_scale": torch.tensor(scale, device=DEVICE, requires_grad=True),
    }
    given = {k: v(m).to(DEVICE) if callable(v) else v for k, v in options.items()}
    per_sample = any(v.get("reduction") == "none" for v in spec.variants)
    given |= {"reduction": "none" if per_sample else "sum", "logit_bias": bias or 0.0}
    if needed(spec) or not accepts(spec, given):
        pytest.skip("not an option of this loss")
    with fastvlm_loss.backend("triton"):
        got = evaluate(spec.function, tensors, given)
    exact, dense = (
        evaluate(spec.oracle, {k: t.detach().to(kind).requires_grad_() for k, t in tensors.items()}, given)
        for kind in (torch.float64, torch.float32)
    )
    long_x, long_y = (t.detach().double().norm(dim=1).max().item() for t in list(tensors.values())[:2])
    peak = scale * long_x * long_y + abs(bias or 0.0)
    eps, rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    # equal gradients of the scores are all rounded the same way, and then cancel
    pull = (eps if name != "all equal" else rounding / 16) * scale
    for key, value in got.items():
        want = exact[key]
        size = want.abs().max().item()
        floor = {
            "loss": eps * (size + peak),
            "image_features": (eps * peak + rounding) * size + pull * long_y,
            "text_features": (eps * peak + rounding) * size + pull * long_x,
            "logit_scale": eps * (size + peak / scale * max(m, exact["loss"].sum().item())),
        }[key]
        budget = 2 * (dense[key].double() - want).abs().max().item() + 4 * floor
        error = (value.double() - want).abs().max().item()
        assert error <= budget, f"{key}, m={m}: error {error:.2e} over {budget:.2e} (largest value {size:.2e})"


@by_dtype
@pytest.mark.parametrize("name", HARD)
@by_loss
def test_hard_inputs(spec, name, dtype):
    in_turn = (list(HARD).index(name) + DTYPES.index(dtype)) % 3 == 0
    for m in (5, 300) if ON_GPU or in_turn else (5,):
        check_hard_inputs(spec, name, dtype, m)


@by_dtype
def test_any_finite_score_gives_a_finite_loss(dtype):
    size = 1e2 if dtype == torch.float16 else 1e4
    x, y, scale = leaves(130, dtype=dtype, scale=1e4)
    results = run([(size * x).detach().requires_grad_(), (size * y).detach().requires_grad_(), scale])
    assert all(r.isfinite().all() for r in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_features_reach_loss_and_gradients(value):
    for which in (0, 1):
        tensors = leaves(300)
        with torch.no_grad():
            tensors[which][123, 4] = value
        loss, *gradients = run(tensors)
        assert not loss.isfinite() and not any(g.isfinite().all() for g in gradients)


@by_dtype
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_same_bits_every_run(dtype, options):
    tensors = leaves(3000 if ON_GPU else 300, dtype=dtype)
    assert_same_bits(run(tensors, **options), run(tensors, **options))


@pytest.mark.parametrize("m", [129, 3000] if ON_GPU else [129])
def test_every_combination_of_requires_grad(m):
    full = leaves(m)
    with fastvlm_loss.backend("triton"):
        want = torch.autograd.grad(clip_loss(*full), full)
        for wanted in itertools.product((False, True), repeat=3):
            if any(wanted):
                some = [t.detach().clone().requires_grad_(w) for t, w in zip(full, wanted, strict=True)]
                clip_loss(*some).backward()
                for tensor, gradient in zip(some, want, strict=True):
                    assert (tensor.grad is None) == (not tensor.requires_grad)
                    assert tensor.grad is None or torch.equal(tensor.grad, gradient)


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), [(130, 40), (7, 300), (0, 257), (130, 0)])
def test_gradients_of_first_rows_are_those_of_all(dtype, rows, cols, monkeypatch):
    monkeypatch.setattr(backend, "_workspace", 2**14)  # several macro-tiles
    x, y, scale = leaves(130, n=300, dtype=dtype)
    problem = Problem.of(x, y, scale, labels=labels(130, 300, "cpu", torch.Generator().manual_seed(0)).to(DEVICE))
    given = *(None if t is None else t.detach() for t in problem.tensors()), torch.cat(problem.targets())
    state = STATISTICS["triton"](*given, "softmax", 3, False)[2:]
    wanted = *given, *state, torch.rand_like(given[-1]), None, "softmax", 3, True, True, True, False
    swept = *given[:-1], True, True, True
    for whole, first in ((GRADIENT["triton"](*wanted), GRADIENT["triton"](*wanted, rows, cols)),
                         (SWEEP["triton"](*swept)[1:], SWEEP["triton"](*swept, rows, cols)[1:])):  # fmt: skip
        assert first[0].shape == (rows, 64) and first[1].shape == (cols, 64)
        for a, b in zip(whole, first, strict=True):
            torch.testing.assert_close(b, a[: len(b)] if b.dim() else a)


@by_dtype
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "image_ids": ids}], ids=["plain", "ids"])
def test_workspace_changes_only_rounding(dtype, options, monkeypatch):
    m = 3000 if ON_GPU else 400
    tensors = leaves(m, dtype=dtype)
    given = {k: v(m, m, DEVICE, torch.Generator().manual_seed(0)) if callable(v) else v for k, v in options.items()}
    whole = run(tensors, **given)
    for size in (2**12, 2**20) if ON_GPU else (2**12, 2**17):
        monkeypatch.setattr(backend, "_workspace", size)
        loss, *gradients = run(tensors, **given)
        assert_near([loss], whole[:1], 1e-6)
        assert_near(gradients, whole[1:], 2 * torch.finfo(dtype).eps + 1e-5)


@by_dtype
def test_agrees_with_the_other_backends(dtype):
    m, d = (4096, 512) if ON_GPU else (200, 64)
    tensors = leaves(m, d, dtype=dtype, scale=100.0)
    got = run(tensors, label_smoothing=0.1, reduction="none")
    for name in ("torch", "dense"):
        with fastvlm_loss.backend(name):
            loss = clip_loss(*tensors, label_smoothing=0.1, reduction="none")
        want = [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]
        # tensor cores accumulate with fewer bits than fp32: 1e-5 of the scale at D = 512
        assert (got[0] - want[0]).abs().max() <= 1e-5 * 100.0
        assert_near(got[1:], want[1:], 2 * torch.finfo(dtype).eps + 1e-4)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_matmul_precision(precision):
    # products of rounded operands (tf32 has 10 bits) at worst; "highest" is pinned by the matrix
    tensors = leaves(300, dtype=torch.float32, scale=10.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with nullcontext() if ON_GPU else interpreter.tf32_products():
            got = run(tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    loss = registry["clip_loss"].oracle(*wide)
    assert_near(got, [loss.detach(), *torch.autograd.grad(loss, wide)], 1e-5 if precision == "highest" else 10 * 2**-10)
