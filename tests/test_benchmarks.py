"""The benchmark program: its gate, its fits, its saved results, and the README made from them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastvlm_loss import clip_loss
from fastvlm_loss.losses import registry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a program of the repository, not a part of the package

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import baselines, gate, measure, plots, readme, report, store  # noqa: E402
from benchmarks.targets import targets  # noqa: E402

CLIP = registry["clip_loss"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = "--quick --losses clip_loss --only speed small growth --repeats 1 --threads 1 --output"
    status = program.main([*options.split(), str(folder)])
    assert status == 0
    return folder / "cpu.json"


def test_the_program_runs_end_to_end(saved):
    result = json.loads(saved.read_text())
    loss = result["losses"]["clip_loss"]
    assert {row["contestant"] for row in loss["speed"]} >= {"limit", baselines.OURS, baselines.DENSE}
    assert all(row["median"] >= row["min"] > 0 for part in ("speed", "small") for row in loss[part])
    assert not any(who.startswith(baselines.OURS) for who in loss["refused"])
    assert result["hardware"]["cores"] and result["versions"]["torch"]
    assert list(targets(result, "clip_loss"))
    assert str(ROOT) not in saved.read_text()


def test_memory_is_measured_for_ours_and_dense(saved):
    rows = json.loads(saved.read_text())["losses"]["clip_loss"]["growth"]
    extra = {(row["contestant"], row["n"]): row["extra"] for row in rows if "extra" in row}
    matrix = 4 * 1024**2
    assert 2 * matrix < extra[baselines.DENSE, 1024] < 8 * matrix


def test_a_saved_result_gives_the_same_table_and_plots_again(saved):
    result = store.load(saved)
    assert saved.with_suffix(".md").read_text() == report.markdown(result) + "\n"
    first = {path: path.read_bytes() for path in plots.draw(result, saved.parent)}
    assert len(first) == 2
    plots.draw(result, saved.parent)
    for path, image in first.items():
        assert path.read_bytes() == image and len(image) < 60_000


def test_an_incomplete_run_is_not_saved_unasked(capsys, monkeypatch):
    monkeypatch.setattr(program, "run_loss", lambda *_: {"missing": {}, "refused": {}, "gate": [], "fits": []})
    monkeypatch.setattr(store, "save", lambda *_: pytest.fail("saved"))
    assert program.main(["--quick", "--threads", "1"]) == 0
    assert "Nothing saved" in capsys.readouterr().out


def judge(loss, dtype=torch.float32):
    return list(gate.gate(CLIP, {"candidate": loss}, dtype, "cpu", (24, 16), (150, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_passes_our_loss(dtype):
    verdicts = judge(clip_loss, dtype)
    assert [v.n for v in verdicts] == [24, 150] and all(v.passed for v in verdicts)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda **t: clip_loss(**t, directions="image"),
        lambda **t: clip_loss(**t) * torch.nan,
        lambda **t: clip_loss(**{**t, "image_features": t["image_features"].detach()}) + 0 * t["image_features"].sum(),
    ],
    ids=["one direction", "NaN", "no gradient of the images"],
)
def test_the_gate_refuses_a_wrong_loss(wrong):
    for verdict in judge(wrong):
        assert not verdict.passed and "allowed" in verdict.reason


def test_the_gate_refuses_a_loss_that_raises():
    def broken(**_):
        raise ValueError("not here")

    assert [v.reason for v in judge(broken)] == ["not here", "not here"]


def test_a_missing_baseline_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    found, missing = baselines.contestants(CLIP)
    assert "open_clip ClipLoss" not in found and "open_clip" in missing["open_clip ClipLoss"]


def test_a_new_loss_has_contestants_without_an_entry():
    from fastvlm_loss.losses import LossSpec

    def new_loss(image_features, text_features, logit_scale):
        return clip_loss(image_features, text_features, logit_scale)

    found, missing = baselines.contestants(LossSpec(new_loss, new_loss, "", ""))
    assert set(found) == {baselines.OURS, f"{baselines.OURS}, torch backend", baselines.DENSE} and not missing


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_fit_recovers_a_known_exponent(exponent):
    sizes = [1024 * 2**i for i in range(7)]
    factor, found = measure.power_law(sizes, [3.5 * n**exponent for n in sizes])
    assert found == pytest.approx(exponent, abs=1e-9) and factor == pytest.approx(3.5)


def test_timing_is_interleaved_and_counts_no_warm_up():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = measure.interleaved(calls, rounds=3, device="cpu", warmup=1)
    assert [order[i : i + 3] for i in (0, 3, 6, 9)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert {t.repeats for t in timings.values()} == {3}


def test_splice_replaces_only_what_is_between_the_markers():
    page = f"a\n{readme.START}\nold\n{readme.END}\nb\n"
    assert readme.splice(page, "new") == f"a\n{readme.START}\nnew\n{readme.END}\nb\n"
    with pytest.raises(ValueError, match="markers"):
        readme.splice("a", "new")


def test_the_readme_shows_the_saved_results():
    text = readme.README.read_text() if readme.README.exists() else ""
    if readme.START not in text:
        pytest.skip("the README has no benchmark markers yet")
    assert text == readme.splice(text, readme.block()), "run: python -m benchmarks readme"
    for path in store.RESULTS.glob("*.json"):
        assert not json.loads(path.read_text())["settings"]["quick"], f"{path.name} is a quick run"
