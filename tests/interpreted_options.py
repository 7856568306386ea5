"""Run by test_kernels.py in its own process: every option of the engine's verbs by the kernels, in several tiles."""

import itertools

import interpreter
import pytest
import torch
from engine_cases import CASES, answer, targets, tensors
from fastvlm_loss.kernels import configs

from fastvlm_loss.scores.selection import Selection

interpreter.install()

KINDS = ("paired", "ids", "labels", "labels and ids")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAYS = list(itertools.product(DTYPES, ((True, True), (True, False), (False, True)), (False, True)))
TILES = [configs.Tile(*sizes, warps=4, stages=2) for sizes in ((32, 32, 16, 16), (16, 64, 32, 32), (64, 16, 16, 16))]
M, N, D, E = 37, 50, 40, 24
ULPS = 4
LAW = torch.tensor([0.5, 0.0])
ALIKE = ("out", "hard, beta 0", "hard, detached", "tempered", "absolute filter", "guide")  # others have their kernels


def rounded(made, dtype):
    """The same with features that the dtype holds."""
    return {k: v.to(dtype).double() if k in ("x", "y", "tx", "ty") else v.float().double() for k, v in made.items()}


def floor(key, want, made, dtype):
    """A rounding of the largest score in what depends on scores, and one of the output."""
    eps, rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    long_x, long_y = (made[k].norm(dim=1).max().item() for k in ("x", "y"))
    factor = max(made["row"].max().item(), made["col"].max().item(), 1.0)
    peak = factor * (made["scale"].item() * long_x * long_y + 1.0 + made["col_bias"].abs().max().item())
    size = want.abs().max().item()
    if key in ("summary index", "summary negatives", "summary active"):
        return 0.0
    if key.startswith("summary"):
        return eps * peak
    if key in ("x", "y", "tx", "ty"):
        # the parts of a gradient are rounded before they cancel
        return (eps * peak + rounding) * (size + made["scale"].item() * max(long_x, long_y) * factor)
    return eps * (size + peak * (M + N))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_every_option_in_many_tiles(case, kind):
    m, n = (M, M) if kind in ("paired", "ids") else (M, N)
    place = 2 * (len(KINDS) * list(CASES).index(case) + KINDS.index(kind))
    for turn in (place, place + 1):
        dtype, directions, hardest = WAYS[7 * turn % len(WAYS)]  # a sample that has every value of every option
        made, given = rounded(tensors(m, n, D, E, seed=turn), dtype), targets(kind, m, n, seed=turn)
        how = {"directions": directions, "hardest": hardest}
        exact = answer("dense", made, case, given, **how)
        dense = answer("dense", made, case, given, dtype=torch.float32, **how)
        tile = TILES[turn % len(TILES)]
        with configs.use("forward", tile), configs.use("gradient", tile):
            got = answer("triton", made, case, given, dtype=dtype, **how)
        assert_within(got, exact, dense, made, dtype, how)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ALIKE])
def test_every_option_beside_a_selection(case):
    turn = list(CASES).index(case)
    dtype, directions, hardest = WAYS[7 * turn % len(WAYS)]
    kind, k, noise = KINDS[turn % 4], (1, 3, 5)[turn % 3], turn % 2 == 0
    m, n = (M, M) if kind in ("paired", "ids") else (M, N)
    made, given = rounded(tensors(m, n, D, E, seed=turn), dtype), targets(kind, m, n, seed=turn)
    how = {"directions": directions, "hardest": hardest}
    exact = answer("dense", made, case, given, **how)
    dense = answer("dense", made, case, given, dtype=torch.float32, **how)
    tile, selection = TILES[turn % len(TILES)], Selection(k, noise, LAW, None, torch.tensor([5, 3, 0, 0]))
    tile = tile._replace(piece=tile.cols)  # a selection looks at whole tiles
    with configs.use("forward", tile), configs.use("gradient", tile), configs.use("select", tile):
        with configs.use("fused", tile):
            one = answer("triton", made, case, given, dtype=dtype, selection=selection, **how)
        with configs.use("fused", None):
            two = answer("triton", made, case, given, dtype=dtype, selection=selection, **how)
    for key in ("order", "product"):
        assert torch.equal(one.pop(key), two[key])
    assert_within(one, exact, dense, made, dtype, how)


def assert_within(got, exact, dense, made, dtype, how):
    """An error of at most twice that of the dense way in fp32 and a few roundings."""
    assert got.keys() == exact.keys()
    for key, value in got.items():
        want, value = exact[key].double(), value.double()
        same = value == want  # infinities
        error = torch.where(same, 0.0, (value - want).abs()).max().item()
        own = torch.where(dense[key] == want, 0.0, (dense[key] - want).abs()).max().item()
        budget = 2 * own + ULPS * floor(key, torch.where(want.isfinite(), want, 0.0), made, dtype)
        assert error <= budget, f"{key} {dtype} {how}: error {error:.2e} over {budget:.2e}"
