"""Tuning: candidates fit the hardware, a tile that changes the result is thrown out, the printed row is a row."""

import pytest
import torch
from fastvlm_loss.kernels import configs

from tools import tune

WIDE, NARROW = configs.Tile(128, 256, 64, 64, 8, 3), configs.Tile(64, 64, 32, 32, 4, 2)


def test_candidates_fit_a_block():
    for half in (True, False):
        tiles = tune.candidates(half)
        assert len(set(tiles)) == len(tiles) > 10
        for tile in tiles:
            assert (tile.rows + tile.cols) * tile.depth * (2 if half else 4) * tile.stages <= 227 * 1024
            assert tile.rows * tile.cols // (32 * tile.warps) <= 128 and tile.cols % tile.piece == 0


def test_a_tile_that_changes_the_result_is_thrown_out(capsys):
    def call():
        chosen = configs.choose("gradient", 90, "half", 768, "plain")
        if chosen == configs.Tile(1, 1, 16, 1, 1, 1):
            raise RuntimeError("out of resource: shared memory")
        return {"loss": torch.tensor(2.0 if chosen == NARROW else 1.0)}

    found = tune.best("gradient", call, [WIDE, NARROW, configs.Tile(1, 1, 16, 1, 1, 1)], 3, "cpu")
    assert {tile for _, tile in found} == {None, WIDE}
    assert [s for s, _ in found] == sorted(s for s, _ in found)
    told = capsys.readouterr().err
    assert "another result than the table's" in told and "out of resource" in told


def test_the_printed_row_is_a_row_of_the_table():
    line = tune.row("forward", 90, "half", 768, "plain", (0.00291, WIDE), 32768)
    table = eval("{" + line.split(",  #")[0] + "}", {"Tile": lambda *a: configs.Tile(*a)})
    assert table == {("forward", 90, "half", 1024, "plain"): WIDE}
    assert "2.91 ms at 32768 x 768" in line


def test_a_tile_in_use_is_taken_and_put_back():
    before = configs.choose("forward", 90, "half", 768, "plain")
    with configs.use("forward", NARROW):
        assert configs.choose("forward", 90, "half", 768, "plain") == NARROW
        with configs.use("forward", WIDE):
            assert configs.choose("forward", 90, "half", 768, "plain") == WIDE
        assert configs.choose("forward", 90, "half", 768, "plain") == NARROW
    assert configs.choose("forward", 90, "half", 768, "plain") == before


def test_an_unknown_tile_is_named():
    with pytest.raises(ValueError, match="no tile for forward, sm_70, half, D = 768, plain"):
        configs.choose("forward", 70, "half", 768, "plain")
