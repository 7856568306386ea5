"""The benchmark of hard negatives: everybody takes part and agrees, the table and the targets say what was measured."""

import json
import math

import torch

from benchmarks import negatives, readme
from benchmarks.negatives import CONTESTANTS, DENSE, DRAWN, FUSED, LOOP, OURS, PRODUCT, TWICE


def test_a_quick_run(tmp_path, capsys):
    path = tmp_path / "quick" / "here.json"
    assert negatives.main(["--quick", "--rounds", "2", "--output", str(path)]) == 0
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    rows = {r["contestant"]: r for r in result["sizes"][0]}
    assert list(rows) == [who for who in CONTESTANTS if who != TWICE]  # a GPU's
    assert all(r["median"] > 0 and r["extra"] is not None for r in rows.values())
    assert "| **fastvlm_loss, the largest** |" in printed and "time of drawing over the usual loop, N = 256" in printed
    assert path.with_suffix(".md").read_text().strip() in printed
    assert result["hardware"]["cores"] and result["versions"]["torch"]


def test_ours_and_the_dense_way_pick_the_same():
    x, y = negatives.features(negatives.Size(200, 32, 5), torch.float32, "cpu")
    found = CONTESTANTS[OURS](x, y, 5)
    by_row, by_column = CONTESTANTS[DENSE](x, y, 5)
    assert torch.equal(found.text_index, by_row.indices) and torch.equal(found.image_index, by_column.indices.T)


def test_targets_are_met_or_missed_as_measured():
    row = {"n": 8192, "d": 512, "k": 8, "dtype": "float32", "extra": 65e6}
    rows = [{**row, "contestant": OURS, "median": 0.5}, {**row, "contestant": DENSE, "median": 0.9}]
    time, memory, drawn = negatives.targets(rows, "cpu")
    assert drawn.startswith("not measured")
    assert time.startswith("MISSED") and "0.556, wanted at most 0.5" in time and memory.startswith("MISSED")
    rows[1]["median"] = 1.1
    assert negatives.targets(rows, "cpu")[0].startswith("met")
    on_gpu = [*rows, {**row, "contestant": PRODUCT, "median": 0.4}]
    assert negatives.targets(on_gpu, "cuda")[1].startswith("met") and math.isclose(0.5 / 0.4, 1.25)
    ways = [{**row, "contestant": FUSED, "median": 1.1}, {**row, "contestant": TWICE, "median": 1.0}]
    assert negatives.targets([*on_gpu, *ways], "cuda")[-1].startswith(
        "MISSED time of a loss with negatives over its two"
    )
    small = [
        {**row, "n": 1024, "contestant": DRAWN, "median": 1.0},
        {**row, "n": 1024, "contestant": LOOP, "median": 4},
    ]
    assert negatives.targets(small, "cpu")[0].startswith("MISSED")


def test_memory_holds_no_matrix():
    size = negatives.Size(4096, 64, 8)  # whose matrix would take 67 MB
    for who in (OURS, DRAWN):
        assert negatives._peak(who, size, "float32", "cpu") < 16e6


def test_the_readme_has_every_saved_result():
    text = readme.README.read_text()
    assert negatives.block() in text
