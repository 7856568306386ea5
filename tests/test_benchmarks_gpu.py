"""The benchmark's suite of a GPU, rehearsed on a CPU: order, budget, adapters, the answer at a size, targets, page."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import clip_loss
from fastvlm_loss.losses import LossSpec, registry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a program of the repository, not a part of the package

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import baselines, check, first_call, gate, measure, pace, parts, report, store, suite, sweep  # noqa: E402
from benchmarks.inputs import inputs  # noqa: E402
from benchmarks.size import Size  # noqa: E402
from benchmarks.targets import targets  # noqa: E402
from benchmarks.work import work  # noqa: E402

CLIP = registry["clip_loss"]
pytestmark = pytest.mark.usefixtures("one_thread")


def siglip_loss(image_features, text_features, logit_scale, logit_bias):
    scores = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(scores), device=scores.device, dtype=scores.dtype) - 1
    total = -F.logsigmoid(signs * scores).sum(dtype=torch.promote_types(scores.dtype, torch.float32))
    return total / len(scores)


SIGLIP = registry["siglip_loss"]
LINEAR = registry["linear_cross_entropy"]
BOTH_LOSSES = pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=lambda spec: spec.name)


def inputs_of(spec, n=96, d=64, dtype=torch.float32):
    return inputs(spec, Size.square(n, d), dtype, "cpu")


@pytest.fixture
def stand_ins(monkeypatch):
    """The packages of the peers with the signatures of their releases, and dense maths."""

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        assert head_dim >= 16 and q.shape[1] % head_dim == 0
        return F.cross_entropy((scale * q).float() @ k.float().T, labels, reduction="none")

    class MemoryEfficientCLIPLoss(torch.nn.Module):
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
            assert normalized_inputs and not stable and isinstance(temperature, float)
            super().__init__()
            self.temperature = temperature

        def forward(self, image_features, text_features, tau_plus=None):
            return clip_loss(image_features, text_features, 1 / self.temperature)

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        assert filter_eps is None
        return F.cross_entropy(e @ c.T, targets)

    class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
        def __init__(self, ce_weight=None, ignore_index=-100, reduction="mean", accum_dtype=None):
            super().__init__()

        def forward(self, lin_weight, _input, target, bias=None):
            return F.cross_entropy(_input @ lin_weight.T, target)

    def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
        return siglip_loss(img_features, txt_features, log_temperature.exp(), bias)

    for module, thing in {
        "inf_cl": cal_flash_loss,
        "memeff": MemoryEfficientCLIPLoss,
        "cut_cross_entropy": linear_cross_entropy,
        "liger_kernel.transformers": LigerFusedLinearCrossEntropyLoss,
        "siglip_kernel": fused_siglip_loss,
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{thing.__name__: thing}))
    monkeypatch.setattr(torch, "compile", lambda loss: loss)


def test_every_size_has_its_place_and_the_targets_come_first():
    cells = suite.SUITES["gpu"].cells
    assert [c.size for c in cells[:3]] == [Size.square(n, d) for n, d in ((32768, 768), (65536, 768), (1048576, 512))]
    assert cells[2].losses == ("clip_loss",)
    half = [(c.size, s.name) for c in cells if c.dtype == torch.bfloat16 for s in (CLIP, SIGLIP) if c.takes(s)]
    assert len(half) == len(set(half)) == 8 * 4 * 2
    assert {c.dtype for c in cells} == {torch.bfloat16, torch.float16, torch.float32}
    rest = [c.size.n**2 * c.size.d for c in cells[9:]]
    assert rest == sorted(rest)


def test_every_other_loss_comes_before_the_rest_of_the_sizes():
    cells = suite.SUITES["gpu"].cells
    for spec in (spec for name, spec in registry.items() if name not in suite.SWEPT):
        sizes = [c.size for c in cells[:9] if c.takes(spec)]
        assert sizes == ([suite.VOCABULARY] if spec.names else list(suite.FIRST)), spec.name
        assert not any(c.takes(spec) for c in cells[9:])


def test_the_least_work_depends_on_the_loss():
    size = Size.square(100, 10)
    assert work("clip_loss").operations(measure.BOTH, size) == 8 * 100**2 * 10
    assert work("siglip_loss").operations(measure.BOTH, size) == 6 * 100**2 * 10
    assert work("siglip_loss").operations(measure.FORWARD, size) == work("new").operations(measure.FORWARD, size)
    assert work("soft_target_clip_loss").said() == "10·N²·D operations (forward alone: 3·N²·D)"
    assert work("linear_cross_entropy").operations(measure.FORWARD, Size(40, 70, 10)) == 2 * 40 * 70 * 10


@pytest.mark.parametrize("spec", [CLIP, SIGLIP, LINEAR], ids=lambda spec: spec.name)
def test_the_adapters_of_the_peers_compute_the_loss(spec, stand_ins):
    found, missing = baselines.contestants(spec, peers=True)
    assert next(iter(found)) == baselines.OURS
    gate_sizes = (Size(48, 80, 64), Size(96, 130, 32)) if spec.names else (Size.square(48, 64), Size.square(96, 32))
    assert all("open_clip" in why or f"of torch {torch.__version__}" in why for why in missing.values())
    verdicts = list(gate.gate(spec, found, torch.float32, "cpu", *gate_sizes))
    assert {v.contestant: v.reason for v in verdicts if not v.passed} == {}
    assert {v.contestant for v in verdicts if set(v.errors) != {"loss", *verdicts[0].errors}} <= {"memeff"}


@BOTH_LOSSES
def test_peers_that_are_missing_or_break_at_import_are_skipped_by_name(spec, monkeypatch, tmp_path):
    names = {
        "clip_loss": {"Inf-CL", "memeff", "Cut Cross-Entropy twice", "Liger twice"},
        "siglip_loss": {"siglip-kernel"},
    }
    for module in ("inf_cl", "memeff", "cut_cross_entropy", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "siglip_kernel.py").write_text("raise RuntimeError('found no driver\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    missing = baselines.contestants(spec, peers=True)[1]
    assert set(missing) >= names[spec.name] and all(missing.values())
    if spec is SIGLIP:
        assert missing["siglip-kernel"] == "import siglip_kernel: found no driver"


def test_the_gate_goes_on_after_a_peer_that_raises_what_it_likes():
    class OutOfResources(Exception):
        pass

    def peer(**_):
        raise OutOfResources("shared memory")

    verdicts = list(
        gate.gate(
            CLIP, {"peer": peer, "ours": clip_loss}, torch.float32, "cpu", Size.square(24, 16), Size.square(48, 16)
        )
    )
    assert {(v.contestant, v.reason) for v in verdicts if not v.passed} == {("peer", "shared memory")}
    assert sum(v.passed for v in verdicts) == 2


@BOTH_LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_rows_are_those_of_the_dense_answer(spec, dtype, monkeypatch):
    monkeypatch.setattr(check, "CHUNK", 96 * 25)  # several chunks, the last one ragged
    given = inputs_of(spec, dtype=dtype)
    full = check.answer(spec, given, {}, full=True)
    sampled = check.answer(spec, given, full.budgets, full=False)
    assert sampled.rows is not None and full.rows is None
    assert torch.allclose(sampled.values["loss"], full.values["loss"], rtol=1e-5)
    for name in ("image_features", "text_features"):
        assert gate.off(sampled.values[name], full.values[name][sampled.rows]) < 5e-6
    got = given.evaluate(spec.function)
    for answer in (full, sampled):
        verdict = answer.judge(baselines.OURS, given, got)
        assert verdict.passed, verdict.reason


@BOTH_LOSSES
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["loss", "image_features", "text_features"])
def test_the_check_at_a_size_refuses_a_wrong_answer(spec, full, name):
    given = inputs_of(spec, dtype=torch.bfloat16)
    answer = check.answer(spec, given, {}, full=full)
    got = given.evaluate(spec.function)
    wrong = got[name].clone()
    if wrong.ndim:
        wrong[0 if full else answer.rows[3]] *= 1.3
    else:
        wrong *= 1.05
    for value in (wrong, wrong * torch.nan):
        verdict = answer.judge("a peer", given, {**got, name: value})
        assert not verdict.passed and name in verdict.reason


def test_an_unknown_loss_too_large_for_fp64_says_so():
    def new_loss(image_features, text_features, logit_scale):
        return clip_loss(image_features, text_features, logit_scale)

    with pytest.raises(LookupError, match="new_loss"):
        check.answer(LossSpec(new_loss, new_loss, "", ""), inputs_of(CLIP), {}, full=False)


@pytest.fixture
def entry():
    return parts.Entry(CLIP, torch.bfloat16, {baselines.OURS: clip_loss, baselines.DENSE: clip_loss, "peer": clip_loss})


def measured(entry, who, n, d, **more):
    return {**entry.row(who, Size.square(n, d)), **more}


def test_the_pace_leaves_out_what_is_too_slow_or_too_large(entry, monkeypatch):
    monkeypatch.setattr(pace, "free", lambda _: 50e9)
    steps = pace.Pace(budget=300.0)
    assert (
        steps.seconds(entry, "peer", Size.square(1024, 64)) == 0
        and steps.rounds(entry, Size.square(1024, 64), 11) == 11
    )
    assert "GB" in steps.refuses(entry, baselines.DENSE, Size.square(65536, 768), "cpu")  # before anything is known
    steps.learn(entry, measured(entry, baselines.DENSE, 32768, 768, extra=8 * 32768**2))
    assert not steps.refuses(entry, baselines.DENSE, Size.square(65536, 768), "cpu")
    assert "GB" in steps.refuses(entry, baselines.DENSE, Size.square(131072, 768), "cpu")
    limit = entry.work.operations(measure.BOTH, Size.square(32768, 768)) / 700e12
    for who, ratio in (("limit", 1.0), (baselines.OURS, 1.5), ("peer", 40.0)):
        steps.learn(entry, measured(entry, who, 32768, 768, median=ratio * limit, over_limit=ratio))
    assert steps.seconds(entry, "peer", Size.square(65536, 768)) == pytest.approx(160 * limit)
    assert not steps.refuses(entry, "peer", Size.square(65536, 768), "cpu")
    assert "would take about" in steps.refuses(entry, "peer", Size.square(1048576, 512), "cpu")
    assert not steps.refuses(entry, baselines.OURS, Size.square(1048576, 512), "cpu") and not steps.too_late(
        entry, Size.square(1048576, 512)
    )
    assert (
        1 <= steps.rounds(entry, Size.square(262144, 768), 11) < steps.rounds(entry, Size.square(32768, 768), 11) == 11
    )
    assert "are left" in pace.Pace(10.0, rates=steps.rates, ratios=steps.ratios).too_late(
        entry, Size.square(1048576, 512)
    )


def test_a_spent_budget_names_what_it_did_not_reach(monkeypatch):
    seen, saved = [], []
    monkeypatch.setattr(sweep, "_admit", lambda run, entry, result: entry)
    monkeypatch.setattr(
        sweep, "_cell", lambda run, entry, cell, pace, result: seen.append((entry.spec.name, cell.size.n))
    )
    monkeypatch.setattr(pace.Pace, "left", lambda self: 4 - len(seen))
    run = parts.Run(suite.SUITES["gpu"], 1, 1, None, lambda line: None)
    specs = {"clip_loss": CLIP, "siglip_loss": SIGLIP}
    results = sweep.sweep(run, specs, 100.0, lambda result: saved.append(len(seen)))
    assert seen == [("clip_loss", 32768), ("siglip_loss", 32768), ("clip_loss", 65536), ("siglip_loss", 65536)]
    late = [(r["n"], r["d"], r["dtype"]) for r in results["clip_loss"]["not_reached"]]
    assert (1048576, 512, "bfloat16") in late and (32768, 768, "float16") in late and len(late) == 32 + 2 - 2
    assert all(r["why"] == "no time left" for r in results["clip_loss"]["not_reached"])
    assert saved[:4] == [1, 2, 3, 4]


def test_a_size_that_fails_does_not_take_the_others_with_it(monkeypatch):
    def cell(run, entry, cell, pace, result):
        if cell.size.n == 256:
            raise RuntimeError("device lost\ndetails")

    monkeypatch.setattr(sweep, "_cell", cell)
    run = parts.Run(replace(suite.SUITES["gpu"].quick(), device="cpu", peers=False), 1, 1, None, lambda line: None)
    result = sweep.sweep(run, {"clip_loss": CLIP}, 100.0, lambda _: None)["clip_loss"]
    assert [(r["n"], r["why"]) for r in result["not_reached"]] == [(256, "device lost")] * 2


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A rehearsal of a loss of each kind, with a baseline that answers wrongly."""
    folder = tmp_path_factory.mktemp("swept")

    def wrong():
        return lambda **t: clip_loss(**t) * (1 if len(t["image_features"]) < 256 else 1.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(baselines.PEERS["clip_loss"], "wrong at size", wrong)
        patch.setattr(torch, "compile", lambda loss: loss)
        patch.setattr(gate, "DRAWS", 4)  # of 2 the dense errors are now and then too small to judge others by
        patch.setattr(measure.ProductRate, "SHAPE", {"cpu": (128, 64, 128)})
        options = "--suite gpu --quick --device cpu --repeats 1 --threads 1 --budget 100"
        losses = "clip_loss siglip_loss soft_target_clip_loss linear_cross_entropy"
        assert program.main([*options.split(), "--output", str(folder), "--losses", *losses.split()]) == 0
    return folder / "gpu.json"


def test_the_gpu_suite_runs_end_to_end(swept):
    result = json.loads(swept.read_text())
    square = {(None, 256, "bfloat16"), (None, 512, "bfloat16"), (None, 256, "float32")}
    expected = {
        "clip_loss": square,
        "siglip_loss": square,
        "soft_target_clip_loss": {(None, 256, "bfloat16")},
        "linear_cross_entropy": {(128, 512, "bfloat16")},
    }
    assert list(expected) == list(result["losses"])
    for name, loss in result["losses"].items():
        assert not loss["not_reached"] and {r["rows"] for r in loss["checks"]} == {"all rows"}
        ours = {(r.get("m"), r["n"], r["dtype"]) for r in loss["speed"] if r["contestant"] == baselines.OURS}
        assert ours == expected[name]
        assert {r["contestant"] for r in loss["memory"]} >= {baselines.OURS, baselines.DENSE}
        assert loss["first_calls"][0]["seconds"] > 0
        timed = {r["contestant"] for r in loss["speed"]}
        assert "limit" in timed and (parts.CLIP in timed) == (name in ("siglip_loss", "soft_target_clip_loss"))
    clip = result["losses"]["clip_loss"]
    assert set(clip["missing"]) >= {"Inf-CL", "memeff"}
    assert {r for r in clip["refused"]} >= {"wrong at size, bfloat16, 256 x 64", "wrong at size, bfloat16, 512 x 64"}
    assert not any(r["contestant"] == "wrong at size" for r in clip["speed"] + clip["memory"])
    assert {baselines.METRICS, baselines.COMPILED} <= {r["contestant"] for r in clip["speed"]}
    assert str(ROOT) not in swept.read_text()


def test_the_page_of_a_sweep(swept, capsys):
    assert program.main(["show", str(swept)]) == 0
    page = capsys.readouterr().out
    assert "`siglip_loss`, forward + backward, N = 256, D = 64:" in page and "| 512 × 64 |" in page
    assert "backward, N = 512" not in page  # it has no table
    assert "8·N²·D operations (forward alone: 2·N²·D); for `siglip_loss` and `linear_cross_entropy` 6·N²·D" in page
    assert "| `clip_loss`, with metrics |" in page and "| `linear_cross_entropy`, 128 × 512 × 64 |" in page
    opened = page.partition("<summary>`siglip_loss` beside its baselines")[0]
    assert "`clip_loss`, forward + backward, N = 256, D = 64:" in opened and "`siglip_loss`, forward" not in opened
    assert "Not measured: memeff (" in page and "Not measured: wrong at size, bfloat16, 256 x 64 (wrong at" in page
    assert "The first call of fastvlm_loss" in page and "not measured: ms, bfloat16 at 65536 x 768" in page
    result = store.load(swept)
    loss = result["losses"]["clip_loss"]
    late = {"n": 512, "d": 64, "dtype": "bfloat16", "why": "no time left"}
    out = {**loss["memory"][0], "contestant": "memeff", "why": "would take about 9 s"}
    died = {**loss["memory"][0], "contestant": "huge", "extra": None, "died": "out of memory"}
    loss = {**loss, "not_reached": [late], "left_out": [out], "memory": [*loss["memory"], died]}
    page = report.markdown({**result, "losses": {"clip_loss": loss}})
    assert "Not reached: 512 × 64 bf16 (no time left)." in page and "memeff (would take about 9 s)" in page
    assert "| huge |" in page and "died" in page


def test_show_wants_a_file_and_a_gpu_suite_wants_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["show"]) == 2 and program.main(["--suite", "gpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_targets_of_a_gpu():
    def row(who, n, d, seconds, limit=0.01):
        keys = {"contestant": who, "n": n, "d": d, "dtype": "bfloat16", "mode": measure.BOTH}
        return {**keys, "median": seconds, "over_limit": seconds / limit}

    speed = [row(baselines.OURS, 32768, 768, 0.014), row(baselines.DENSE, 32768, 768, 0.03)]
    speed += [row(baselines.COMPILED, 32768, 768, 0.016), row("memeff", 65536, 768, 1.0)]
    memory = [{**row(baselines.OURS, 1048576, 512, 1.0), "extra": 7.9e9}]
    result = {
        "settings": {"headline": []},
        "losses": {"clip_loss": {"speed": speed, "memory": memory}, "siglip_loss": {"speed": [], "memory": []}},
    }
    said = {t.what: str(t) for t in targets(result, "clip_loss")}
    assert len(said) == 2 * 6 + 1 + 1  # and what the by-products cost
    assert said["share of the limit, bfloat16 at 32768 x 768"].startswith("met")
    assert said["times as fast as dense, bfloat16 at 32768 x 768"].startswith("met")
    assert said["times as fast as dense, torch.compile, bfloat16 at 32768 x 768"].startswith("MISSED")
    assert said["times as fast as memeff, bfloat16 at 65536 x 768"].startswith("not measured")  # not without ours
    assert said["GB extra, bfloat16 at 1048576 x 512"] == (
        "met    GB extra, bfloat16 at 1048576 x 512: 7.9, wanted at most 8"
    )
    assert [str(t) for t in targets(result, "siglip_loss")] == [
        "not measured: ms, bfloat16 at 65536 x 768, wanted at most 49"
    ]


def test_kernels_compiled_by_the_first_call_are_counted():
    knobs = pytest.importorskip("triton.knobs")

    def call():
        for hit in (False, True, False):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)

    found = first_call.first_call(call, "cpu")
    assert (found["compiled"], found["from_cache"]) == (2, 1) and knobs.compilation.listener is None
