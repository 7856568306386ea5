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
from benchmarks import baselines, costs, dense, gate, measure, parts, plots, readme, report, store  # noqa: E402
from benchmarks.inputs import clip_inputs, inputs  # noqa: E402
from benchmarks.size import Size  # noqa: E402
from benchmarks.suite import SUITES  # noqa: E402
from benchmarks.targets import targets  # noqa: E402

CLIP = registry["clip_loss"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = "--quick --losses clip_loss --only speed small growth --repeats 1 --threads 1 --output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "DRAWS", 2)
        patch.setattr(measure.ProductRate, "SHAPE", {"cpu": (128, 64, 128)})  # bf16 takes a second at its own elsewhere
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


GATE = Size.square(24, 16), Size.square(150, 32)


def judge(loss, dtype=torch.float32):
    return list(gate.gate(CLIP, {"candidate": loss}, dtype, "cpu", *GATE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_passes_our_loss(dtype):
    verdicts = judge(clip_loss, dtype)
    assert [v.size.n for v in verdicts] == [24, 150] and all(v.passed for v in verdicts)


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
    assert set(found) == {baselines.OURS, baselines.DENSE} and not missing


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


def test_every_loss_has_a_plain_dense_baseline_that_the_gate_lets_pass(monkeypatch):
    monkeypatch.setattr(gate, "DRAWS", 2)
    for name, spec in registry.items():
        sizes = (Size(12, 20, 16), Size(40, 70, 16)) if spec.names else (Size.square(12, 16), Size.square(60, 16))
        for dtype in (torch.float32, torch.bfloat16):
            both = {baselines.OURS: spec.function, baselines.DENSE: dense.WRITTEN[name]}
            judged = list(gate.gate(spec, both, dtype, "cpu", *sizes))
            assert {v.contestant: v.reason for v in judged if not v.passed} == {}


def test_the_contestants_of_a_loss_take_its_own_names_and_options():
    given = inputs(registry["soft_target_clip_loss"], Size.square(16, 8), torch.bfloat16, "cpu")
    assert list(given.tensors) == ["image_features", "text_features", "logit_scale"]
    assert given.options["teacher_image_features"].shape == (16, 4)
    assert given.double().options["teacher_image_features"].dtype == torch.float64
    words = inputs(registry["linear_cross_entropy"], Size(6, 11, 8), torch.float32, "cpu")
    assert [t.shape for t in words.features] == [(6, 8), (11, 8)] and words.options["targets"].shape == (6,)
    assert list(clip_inputs(inputs(registry["triplet_loss"], Size.square(4, 8), torch.float32, "cpu")).tensors)[2:] == [
        "logit_scale"
    ]


def test_a_size_says_m_only_where_it_is_not_n():
    assert Size.square(8, 4).row() == {"n": 8, "d": 4} and Size.of({"n": 8, "d": 4}) == (8, 8, 4)
    assert Size(6, 8, 4).said() == "M = 6, N = 8, D = 4" and Size.of(Size(6, 8, 4).row()) == (6, 8, 4)


def row(who, size, seconds, extra=None, dtype="float32"):
    keys = {"contestant": who, "dtype": dtype, **size.row(), "mode": measure.BOTH}
    return {
        **keys,
        **({"extra": extra, "died": ""} if extra is not None else {"median": seconds, "over_limit": seconds}),
    }


def family():
    """A result of three losses at made-up times."""
    square, words = Size.square(8192, 512), Size(4096, 30522, 512)
    frame = {"missing": {}, "refused": {}, "gate": [], "fits": []}
    speed = {
        "clip_loss": [row(baselines.OURS, square, 1.0), row(baselines.METRICS, square, 1.5)],
        "soft_target_clip_loss": [row(baselines.OURS, square, 1.8), row(parts.CLIP, square, 1.0)],
        "linear_cross_entropy": [row(baselines.OURS, words, 3.0), row(baselines.DENSE, words, 4.0)],
    }
    peaks = [row(baselines.OURS, words, 0, 10**7), row(baselines.DENSE, words, 0, 10**9)]
    return {
        name: {**frame, "speed": rows, "memory": peaks if name == "linear_cross_entropy" else []}
        for name, rows in speed.items()
    }


def test_targets_are_ratios_within_the_run():
    result = {"settings": {}, "losses": family()}
    said = {name: [str(t) for t in targets(result, name)] for name in result["losses"]}
    assert said["clip_loss"][0].startswith("told   time of fastvlm_loss, with metrics over fastvlm_loss, float32")
    assert [line[:6] for line in said["soft_target_clip_loss"]] == ["MISSED"]
    time, memory = said["linear_cross_entropy"]
    assert time == "met    time of fastvlm_loss over dense, float32 at 4096 x 30522 x 512: 0.75, wanted at most 1"
    assert memory.startswith("met    extra memory") and memory.endswith("0.01, wanted at most 0.1")


def test_the_first_table_has_a_line_for_each_loss():
    sizes = {name: Size.of(loss["speed"][0]) for name, loss in family().items()}
    lines = costs.costs(family(), sizes).splitlines()
    assert lines[0] == "What each loss costs, forward + backward, N = 8192, D = 512:"
    assert lines[4:] == [
        "| `clip_loss` | 1 s | 1.00 | 1.00 |  |  |",
        "| `clip_loss`, with metrics | 1.5 s | 1.50 | 1.50 |  |  |",
        "| `soft_target_clip_loss` | 1.8 s | 1.80 | 1.80 |  |  |",
        "| `linear_cross_entropy`, 4096 × 30522 × 512 | 3 s | 3.00 |  | 0.75 | 10 MB (1 GB) |",
    ]


def test_what_a_cpu_has_no_instructions_for_is_left_out_and_named(monkeypatch):
    asked = []

    def run_loss(run, spec, parts):
        asked.append((run.suite.dtypes, spec.name, parts))
        return {"missing": {}, "refused": {}, "gate": [], "fits": []}

    monkeypatch.setattr(program, "run_loss", run_loss)
    monkeypatch.setattr(program, "too_slow", lambda dtypes: {dtypes[1]: "slow"})
    monkeypatch.setattr(program, "_show", lambda result: asked.append(report.markdown(result)))
    assert program.main(["--losses", "clip_loss", "vqa_loss", "--threads", "1"]) == 0
    (dtypes, *_, first), (*_, last), page = asked
    assert dtypes == (torch.float32,) and page.endswith(" Not measured in bf16: slow.")
    assert "growth" in first and last == ("speed", "memory")
    assert measure.too_slow((torch.float32,)) == {}


def test_every_loss_has_its_part_in_the_cpu_suite():
    cpu = SUITES["cpu"]
    for name, spec in registry.items():
        assert "speed" in cpu.plan(spec).parts and "memory" in cpu.plan(spec).parts
        assert cpu.sizes(spec)[0].n == (30522 if spec.names else 8192), name
    assert cpu.sizes(registry["linear_cross_entropy"]) == (Size(4096, 30522, 512),)
