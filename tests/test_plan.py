"""How the GPU backend cuts a problem: everything is covered, nothing exceeds its bound, no processor idles for long."""

import pytest
from fastvlm_loss.kernels import plan
from fastvlm_loss.kernels.configs import Tile

TILE = Tile(128, 256, 64, 64, 8, 3)
SIZES = [1, 65, 128, 517, 3072, 8192, 10000, 65536, 262144, 1048576]


@pytest.mark.parametrize("m", SIZES)
def test_strips_cover_the_rows_alike(m):
    for blocks in (1, 21, 341):
        found = list(plan.strips(m, blocks, 128))
        assert [at for at, _ in found] == [found[0][1] * k for k in range(len(found))]
        assert sum(size for _, size in found) == m and found[0][1] <= blocks * 128
        assert len(found) == 1 or found[0][1] % 128 == 0
        assert len(found) <= plan.ceil(plan.ceil(m, 128), blocks)  # no launch more than the bound asks for


@pytest.mark.parametrize("m", SIZES)
def test_strips_may_double(m):
    for blocks in (1, 21, 341):
        found = list(plan.strips(m, blocks, 128, first=4))
        wanted = [min(4 << k, blocks) * 128 for k in range(len(found))]
        assert [at for at, _ in found] == [sum(wanted[:k]) for k in range(len(found))]
        assert [size for _, size in found[:-1]] == wanted[:-1] and sum(size for _, size in found) == m


@pytest.mark.parametrize("n", SIZES)
def test_parts_cover_the_columns_and_fill_the_processors(n):
    for blocks in (1, 8, 21, 64, 256):
        tiles = plan.ceil(n, 256)
        count, parts = plan.parts(blocks, tiles, 132)
        assert (parts - 1) * count < tiles <= parts * count
        ideal = blocks * tiles / 132
        rounds = plan.ceil(blocks * parts, 132) * count
        assert rounds <= max(1.05 * ideal, ideal + 2)  # two tiles of a tail, or 5 %


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_macro_tiles_fit_the_workspace(m, n):
    for elements in (2**19, 2**27):
        height, width = plan.macro_tile(m, n, elements, TILE)
        assert height % 128 == 0 and width % 256 == 0
        rows = min(height, m)
        assert rows * plan.round_up(min(width, n), 16) <= max(elements, rows * 256)
