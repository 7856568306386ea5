"""Run by test_kernels.py in its own process: every option of the engine's verbs by the kernels, in several tiles."""

import itertools

import interpreter
import pytest
import torch
from engine_cases import CASES, answer, targets, tensors
from fastvlm_loss.kernels import configs

interpreter.install()

KINDS = ("paired", "ids", "labels", "labels and ids")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAYS = list(itertools.product(DTYPES, ((True, True), (True, False), (False, True)), (False, True)))
TILES = [configs.Tile(*sizes, warps=4, stages=2) for sizes in ((32, 32, 16, 16), (16, 64, 32, 32), (64, 16, 16, 16))]
M, N, D, E = 37, 50, 40, 24
ULPS = 4


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
        assert got.keys() == exact.keys()
        for key, value in got.items():
            want, value = exact[key].double(), value.double()
            same = value == want  # infinities
            error = torch.where(same, 0.0, (value - want).abs()).max().item()
            own = torch.where(dense[key] == want, 0.0, (dense[key] - want).abs()).max().item()
            budget = 2 * own + ULPS * floor(key, torch.where(want.isfinite(), want, 0.0), made, dtype)
            assert error <= budget, f"{key} {dtype} {how}: error {error:.2e} over {budget:.2e}"
