"""The measurement of freezing, checkpointing and bf16: what it counts is right, and its committed table is its own."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainer_cases
import yaml

from fastvlm_loss.trainer import measure, measure_row
from fastvlm_loss.trainer.data import Data
from fastvlm_loss.trainer.measure_kept import Kept
from fastvlm_loss.trainer.measure_table import markdown, picture, saved
from fastvlm_loss.trainer.measure_trial import ROWS
from fastvlm_loss.trainer.model import text as towers

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "trainer" / "cpu-avx2.json"
DOCS = (ROOT / "docs" / "efficiency.md").read_text()
TIME = {name: {"median": 0.5, "spread": 0.1, "steps": 2} for name in ("seconds", "processor")}


def config():
    small = trainer_cases.config("unused", weights={"itc": 1.0, "itm": 1.0, "mlm": 1.0})
    model = small.model
    text, fusion = replace(model.text, dropout=0.1), replace(model.fusion, dropout=0.1)
    return replace(small, model=replace(model, text=text, fusion=fusion, local=()))


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_row, "Data", SimpleNamespace(open=cache(Data.open)))
        yield


@pytest.fixture(scope="module")
def rows(opened_once):
    with pytest.MonkeyPatch.context() as patch:
        # as on a CPU without instructions for bf16, whatever this one has
        patch.setattr(measure_row, "precision_of", lambda config, world: "fp32")
        found = {row.name: measure_row.memory(row, config(), 1) for row in ROWS}
    return {name: row if "why" in row else row | TIME for name, row in found.items()}


def test_the_sizes_are_those_of_the_parameters(rows):
    for row in rows.values():
        bytes_each = 2 if row["row"] == "pure bf16" else 4
        assert row["gradients"] == pytest.approx(bytes_each * row["learn"], abs=8)
        moments, steps = 2 * bytes_each * row["learn"], 4 * 1000  # and a counter of each parameter
        assert moments <= row["optimizer"] <= moments + steps
        assert row["parameters"] == rows["all trainable"]["parameters"]
        assert sum(row["activations_by_type"].values()) == row["activations"] > 0
    assert rows["all trainable"]["learn"] == rows["all trainable"]["parameters"]
    assert rows["pure bf16"]["weights"] == pytest.approx(rows["all trainable"]["weights"] / 2, rel=0.02)


def test_each_configuration_keeps_less(rows):
    kept = {name: row["activations"] for name, row in rows.items()}
    usual = kept["all trainable"]
    assert kept["towers frozen"] < usual
    assert kept["towers frozen, under no_grad"] == kept["towers frozen"], "no graph either way"
    assert kept["checkpointing"] < usual / 2
    assert kept["pure bf16"] < kept["bf16 autocast"] < usual
    assert kept["frozen, checkpointing, bf16 autocast"] == min(kept.values())
    assert rows["towers frozen"]["learn"] < rows["all trainable"]["learn"]


def test_emulated_bf16_is_said(rows):
    for row in ROWS:
        assert rows[row.name].get("why") == (None if row.precision == "fp32" else measure_row.EMULATED), row.name


def test_bf16_that_is_not_emulated_has_a_time(monkeypatch):
    monkeypatch.setattr(measure_row, "precision_of", lambda config, world: "bf16")
    assert "why" not in measure_row.memory(ROWS[4], config(), 1)
    found = measure_row.timing(ROWS[4], config(), 3)
    assert found["seconds"]["steps"] == found["processor"]["steps"] == 3
    assert found["seconds"]["median"] > 0 and found["processor"]["median"] > 0


def test_checkpointing_has_the_same_gradients_and_without_its_random_numbers_that_shows(monkeypatch):
    assert measure_row.difference(config())["relative"] <= measure.AGREE
    monkeypatch.setattr(towers, "checkpoint", partial(towers.checkpoint, preserve_rng_state=False))
    assert measure_row.difference(config())["relative"] > 100 * measure.AGREE


def test_what_autograd_keeps_is_counted_once_and_freed():
    x = torch.randn(100, requires_grad=True)
    with Kept([x]) as kept:
        y = x.exp()  # keeps its result
        z = y * y.detach()  # keeps the same storage again
        (z.bfloat16().exp().float() * x).sum().backward()  # 200 bytes, and as much as fp32; not x, which was given
    assert dict(kept.highest) == {torch.float32: 400 + 400, torch.bfloat16: 200}
    assert kept.now.total() == 0


def child(arguments, steps, what, found):
    if what == measure.GRADIENTS:
        return {"relative": 0.0, "largest": 0.0, "norm": 1.0}
    kind, _, name = what.partition(": ")
    return found[name] if kind == "memory" else TIME


def test_it_writes_json_table_and_picture(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "_apart", partial(child, found=rows))
    assert measure.main(["--output", str(tmp_path), "--steps", "2", "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    result = json.loads(path.read_text())
    assert result["settings"]["batch_size"] == 16 and result["hardware"]["threads"] >= 1 and result["versions"]["torch"]
    assert markdown(result) + "\n" == path.with_suffix(".md").read_text() == capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes() == picture(result)


def test_gradients_that_differ_are_a_failure(rows, monkeypatch, capsys):
    def apart(arguments, steps, what):
        found = child(arguments, steps, what, rows)
        return {**found, "relative": 2e-6} if what == measure.GRADIENTS else found

    monkeypatch.setattr(measure, "_apart", apart)
    assert measure.main([]) == 1
    assert "differ by 2e-06, wanted 1e-06" in capsys.readouterr().err


def test_a_row_in_a_process_of_its_own_reads_the_trainers_yaml(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "batch_size": 8, "device": "cpu", "threads": 1, "weights": {"itc": 1.0},
                "data": {"sources": [{"path": "shapes", "samples": 64}], "size": 32},
                "model": {"image": {"size": 32, "widths": [8, 8, 16, 16]}, "fusion": {"layers": 1}},
            }
        )
    )  # fmt: skip
    found = measure._apart(["--config", str(file)], 1, "memory: towers frozen")
    assert found["row"] == "towers frozen" and found["peak"] > 0 and found["reserved"] is None


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--batch_sise", "8"], ["--config", "none.yaml"]])
def test_a_wrong_argument_ends_it_before_anything_is_measured(wrong, monkeypatch):
    monkeypatch.setattr(measure, "_apart", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        measure.main(wrong)
    assert ended.value.code == 2


def test_a_row_that_dies_is_named(monkeypatch, capsys):
    def died(arguments, steps, what):
        raise RuntimeError(f"{what}: the process ended with status -9")

    monkeypatch.setattr(measure, "_apart", died)
    assert measure.main([]) == 1
    assert "memory: all trainable: the process ended with status -9" in capsys.readouterr().err


def test_the_committed_table_and_the_page_are_those_of_the_numbers():
    result = json.loads(RESULT.read_text())
    table = markdown(result)
    assert RESULT.with_suffix(".md").read_text() == table + "\n"
    assert [row["row"] for row in result["rows"]] == [row.name for row in ROWS]
    assert all(line in DOCS for line in table.splitlines() if line.startswith("|"))
    assert result["gradients"]["relative"] <= measure.AGREE
    for row, what in ((1, "peak"), (1, "activations"), (3, "peak"), (4, "peak"), (4, "activations"), (5, "peak")):
        assert f"{saved(result, result['rows'][row], what):.0%}".replace("%", " %") in DOCS
