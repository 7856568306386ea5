"""Every registered loss x backend x dtype x size x options: value and every gradient within the error budget."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastvlm_loss.backends import cpp
from fastvlm_loss.losses import parameters, registry
from fastvlm_loss.testing import Case, poison, violations

BACKENDS = {
    "torch": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "cpp": [torch.float32, torch.bfloat16],
}
SPECS = list(registry.values())


def accepts(spec, options):
    """A loss without labels has no case that is not square."""
    return spec.takes(*options)


def needed(spec, square=True):
    """What a loss cannot be called without, as its first variant gives it."""
    required = [name for name, p in parameters(spec.function).items() if p.default is p.empty]
    first = {name: value for name, value in spec.variants[0].items() if name in required}
    return first if square else {**first, **spec.not_square}


def rounds_again(options, dtype):
    """Normalising features of 16 bits rounds them once more: test_properties pins it."""
    return options.get("normalize") and dtype.itemsize == 2


def backends():
    for name, dtypes in BACKENDS.items():
        reason = cpp.unavailable() if name == "cpp" else ""
        for dtype in dtypes:
            mark = [pytest.mark.skip(reason=reason)] if reason else []
            yield pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=mark)


@pytest.mark.parametrize(("backend", "dtype"), list(backends()))
@pytest.mark.parametrize("m", [1, 2, 7, 64, 129])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_variants(spec, m, backend, dtype):
    found = []
    for k, options in enumerate(spec.variants):
        if not rounds_again(options, dtype):
            d, bias = ((8, None), (100, -3.0))[(k + m) % 2]
            case = Case(m=m, d=d, dtype=dtype, bias=bias, options=options, backend=backend, seed=k)
            with poison():
                found += violations(spec, case)
    assert not found


@pytest.mark.parametrize(("backend", "dtype"), list(backends()))
@pytest.mark.parametrize(("m", "d"), [(1000, 512), (130, 1100)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_large(spec, m, d, backend, dtype):
    few = [*spec.variants[:1], *spec.variants[3:4]]
    options = [o for o in few if not rounds_again(o, dtype)]
    assert not [v for o in options for v in violations(spec, Case(m=m, d=d, dtype=dtype, options=o, backend=backend))]


@pytest.mark.parametrize(("backend", "dtype"), list(backends()))
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_scale_and_bias(spec, backend, dtype):
    found = []
    for scale, bias, shape in itertools.product((1e-3, 1.0, 100.0, 1e4), (None, 10.0), ((), (1,))):
        for noise in (0.2, 2.0):
            case = Case(
                m=65, d=64, dtype=dtype, scale=scale, bias=bias, scale_shape=shape, noise=noise, backend=backend,
                options=needed(spec),
            )  # fmt: skip
            found += violations(spec, case)
    assert not found


@pytest.mark.parametrize(("dtype", "m", "n", "d"), [(torch.float32, 1537, 3001, 33), (torch.bfloat16, 1700, 1700, 100)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_several_macro_tiles(spec, dtype, m, n, d):
    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    every = {"labels": _labels, "image_ids": _row_ids, "text_ids": _col_ids}
    options = next(o for o in (every, {"labels": _labels}, {}) if accepts(spec, o))
    assert not violations(spec, Case(m, d, n, dtype=dtype, options={**needed(spec, m == n), **options}, backend="cpp"))


@pytest.mark.parametrize("instructions", ["base", "avx2", "avx512", "avx512+bf16"])
def test_every_instruction_set(instructions):
    if cpp.unavailable():
        pytest.skip(cpp.unavailable())
    if os.environ.get("FASTVLM_LOSS_CPU_ISA"):
        pytest.skip("this run has chosen one")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "macro or (cpp and (not_square or 129))"],
        env={**os.environ, "FASTVLM_LOSS_CPU_ISA": instructions}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_unknown_instruction_set_is_named():
    code = "import fastvlm_loss"
    environment = {**os.environ, "FASTVLM_LOSS_CPU_ISA": "avx10"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert cpp.unavailable() or "got 'avx10', wanted one of base, avx2" in run.stderr


def _labels(m, n, device, g):
    return torch.randint(-1, n, (m,), generator=g).to(device)


def _row_ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (m,), generator=g).to(device)


def _col_ids(m, n, device, g):
    return torch.randint(-1, max(m // 2, 1), (n,), generator=g).to(device)


@pytest.mark.parametrize(("backend", "dtype"), list(backends()))
@pytest.mark.parametrize(("m", "n"), [(1, 5), (5, 1), (40, 129), (129, 40), (700, 90)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_not_square(spec, m, n, backend, dtype):
    found = []
    for extra in ({}, {"image_ids": _row_ids, "text_ids": _col_ids}, {"label_smoothing": 0.1, "directions": "text"}):
        options = {"labels": _labels, **extra}
        if accepts(spec, options):
            options = {**needed(spec, m == n), **options}
            found += violations(spec, Case(m=m, n=n, d=24, dtype=dtype, bias=1.0, options=options, backend=backend))
    for k, options in enumerate(spec.variants if spec.names else ()):  # whose two sides never are alike
        found += violations(spec, Case(m=m, n=n, d=24, dtype=dtype, options=options, backend=backend, seed=k))
    assert not found
