"""Every option of the engine's verbs on the C++ backend against the dense score matrix in fp64."""

import pytest
import torch
from engine_cases import CASES, answer, targets, tensors

from fastvlm_loss.backends import cpp
from fastvlm_loss.engine.ops import GRADIENT, STATISTICS
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Hinge

pytestmark = [
    pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable()),
    pytest.mark.usefixtures("one_thread"),  # most of it is small
]
ULPS, EPS = 8, torch.finfo(torch.float32).eps
FEATURES = ("x", "y", "tx", "ty")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SEVERAL = ("out", "in", "hard", "hinge", "taught, tempered", "margin", "biased columns")


def rounded(made, dtype):
    """The same leaves in fp64 with the values they have on the backend."""
    return {k: v.to(dtype if k in FEATURES else torch.float32).double() for k, v in made.items()}


def violations(made, case, given, dtype, **options):
    """What is outside its budget: twice the error of the dense matrix in fp32, and a few units in the last place."""
    exact, dense = (answer("dense", made, case, given, dtype=t, **options) for t in (torch.float64, torch.float32))
    got = answer("cpp", made, case, given, dtype=dtype, **options)
    assert got.keys() == exact.keys()
    peak = 1 + _largest(made["x"], made["y"]) + _largest(made["tx"], made["ty"])
    found = []
    for name, value in got.items():
        want, finite = exact[name].double(), exact[name].isfinite()
        if not torch.equal(finite, value.isfinite()):
            found.append(f"{name}: finite elsewhere")
        elif finite.any():
            size = want[finite].abs().max().item()
            # a sum over all entries is rounded as its parts, O(peak) for each row and column
            terms = peak * (len(made["x"]) + len(made["y"]) if want.dim() == 0 else 1)
            stored = dtype if name in FEATURES else torch.float32
            floor = ULPS * (EPS * (size + terms) + torch.finfo(stored).eps * (size + 1))
            error, own = ((v.double() - want)[finite].abs().max().item() for v in (value, dense[name]))
            budget = 0.0 if name == "summary index" else 2 * own + floor
            if not error <= budget:
                found.append(f"{name}: error {error:.2e} over a budget of {budget:.2e} (largest {size:.2e}): {options}")
    return found


def _largest(x, y):
    return (x.norm(dim=1).max() * y.norm(dim=1).max()).item()


@DTYPES
@pytest.mark.parametrize("kind", ["paired", "ids", "labels", "labels and ids"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_score_matrix(case, kind, dtype):
    m, n = (39, 39) if kind in ("paired", "ids") else (39, 70)
    made, given = rounded(tensors(m, n, 6, 4), dtype), targets(kind, m, n)
    for rows, cols, hardest in ((True, True, False), (True, True, True), (True, False, True), (False, True, False)):
        assert not violations(made, case, given, dtype, directions=(rows, cols), hardest=hardest)


@pytest.mark.parametrize("case", SEVERAL)
def test_several_macro_tiles(case):
    made = rounded(tensors(1700, 1601), torch.float32)
    assert not violations(made, case, targets("labels and ids", 1700, 1601), torch.float32, hardest=case == "margin")


@DTYPES
@pytest.mark.parametrize("case", [*SEVERAL, "two filters, taught", "guide"])
def test_threads_do_not_change_a_bit(case, dtype):
    made, given = tensors(1700, 1601), targets("labels and ids", 1700, 1601)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(answer("cpp", made, case, given, dtype=dtype, hardest=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(v, other[k]) for other in results[1:] for k, v in results[0].items())


@pytest.mark.parametrize("case", ["plain", "out", "in"])
def test_ids_are_compared_whole(case):
    made, ids = rounded(tensors(39, 39, 6, 4), torch.float32), targets("ids", 39, 39)["image_ids"]
    for high in (ids * 2**32 + 5, ids * 2**32 - 1):  # equal low halves; and -1 alone is nobody
        assert not violations(made, case, {"image_ids": high}, torch.float32)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_nan_reaches_the_loss_and_the_gradients(case, dtype):
    made = tensors(40, 40)
    made["x"][7, 3] = torch.nan
    got = answer("cpp", made, case, {}, dtype=dtype)
    assert got["value"].isnan()
    assert got["x"].isnan().any() or got["y"].isnan().any()


@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_any_finite_score_gives_a_finite_loss(case, scale):
    made = {**tensors(40, 40), "scale": torch.tensor(scale), "ts": torch.tensor(scale)}
    got = answer("cpp", made, case, targets("ids", 40, 40), dtype=torch.float32)
    assert all(v.isfinite().all() for k, v in got.items() if not k.startswith("summary"))


@DTYPES
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("case", ["plain", "in", "hard", "hinge", "taught", "biased columns"])
def test_nothing(case, m, n, dtype):
    made, given = tensors(m, n), {"labels": torch.full((m,), -1)}
    got = answer("cpp", made, case, given, dtype=dtype, hardest=True)
    assert not any(v.count_nonzero() for k, v in got.items() if not k.startswith("summary"))


def test_no_active_hinge_needs_no_sweep():
    x = torch.full((9, 4), torch.nan)
    p = Problem.of(x, x, 1.0).weighted(torch.ones(9), torch.ones(9))
    _, _, state, products = STATISTICS["cpp"](*p.tensors(), None, "hinge", Hinge().flags, False)
    dx, dy, *rest = GRADIENT["cpp"](
        *p.tensors(), None, state, products, torch.zeros(18), None, "hinge", Hinge().flags, True, True, True, True
    )
    assert not any(t.count_nonzero() for t in (dx, dy, *rest))


def test_flags_of_no_statistic_are_refused():
    p = Problem.of(torch.ones(3, 2), torch.ones(3, 2), 1.0)
    wrong = {"softmax": (3 + 256 + 512, 3 + 8 + 4), "hinge": (3, 3 + 4), "other": (3,)}
    for name, flags in [(name, each) for name, several in wrong.items() for each in several]:
        with pytest.raises(RuntimeError, match="wanted"):
            STATISTICS["cpp"](*p.tensors(), None, name, flags, False)
