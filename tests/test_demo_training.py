"""The demo's training: resuming is exact, dense and fastvlm follow one curve, and it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastvlm_loss
from fastvlm_loss.data import shapes

pytest.importorskip("open_clip", exc_type=Exception)

from fastvlm_loss.demo import training
from fastvlm_loss.demo.evaluation import encode, retrieval
from fastvlm_loss.demo.options import Config
from fastvlm_loss.demo.towers import fast_bf16
from fastvlm_loss.demo.training import CheckpointError, Run, learning_rate

CPU = torch.device("cpu")
SMALL = Config(data="shapes", steps=20, batch_size=32, size=16)


@pytest.fixture(scope="module")
def splits():
    return shapes.load(train=300, test=50, size=16)


def advanced(run: Run, splits, until: int) -> Run:
    for _ in run.advance(splits.train, until):
        pass
    return run


@pytest.fixture(scope="module")
def unbroken(splits) -> Run:
    return advanced(Run.begin(SMALL, splits.train, CPU), splits, 20)


def test_ten_and_ten_steps_equal_twenty_bitwise(splits, unbroken, tmp_path):
    half = advanced(Run.begin(SMALL, splits.train, CPU), splits, 10)
    half.save(tmp_path / "checkpoint.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    resumed = advanced(Run.load(tmp_path / "checkpoint.pt", CPU), splits, 20)
    assert resumed.step == 20 and resumed.curves == unbroken.curves
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_checkpoint_has_everything_and_loads_safely(splits, unbroken, tmp_path):
    unbroken.save(tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {"config", "step", "vocabulary", "model", "optimizer", "curves"} <= set(state)
    run = Run.load(tmp_path / "c.pt", CPU)
    assert run.config == SMALL and run.tokenizer.vocabulary == unbroken.tokenizer.vocabulary
    caption = splits.test.captions[:1]
    assert torch.equal(run.tokenizer(caption), unbroken.tokenizer(caption))


def test_a_failed_write_keeps_the_old_checkpoint(unbroken, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    path.write_bytes(b"old")

    def broken_save(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training.torch, "save", broken_save)
    with pytest.raises(OSError, match="disk full"):
        unbroken.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    torch.save({"something": "else"}, tmp_path / "other")
    for name in ("text", "other", "missing"):
        with pytest.raises(CheckpointError, match=f"--resume: got .*{name}, which is no checkpoint"):
            Run.load(tmp_path / name, CPU)


def test_resuming_on_other_pairs_is_refused(unbroken):
    other = shapes.load(train=300, test=5, size=16, seed=1)
    with pytest.raises(CheckpointError, match="with other captions"):
        advanced(unbroken, other, 20)


def test_dense_and_fastvlm_follow_the_same_curve(splits, unbroken):
    """Rounding differences of the losses grow through bf16 towers and Adam: 0.7 % at most was measured."""
    dense = advanced(Run.begin(replace(SMALL, loss="dense"), splits.train, CPU), splits, 20)
    ours, theirs = torch.tensor(unbroken.curves["loss"]), torch.tensor(dense.curves["loss"])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    assert ours[-1] < 0.9 * ours[0]


def test_dense_runs_the_dense_backend(monkeypatch):
    forced = []
    real = fastvlm_loss.backend
    monkeypatch.setattr(fastvlm_loss, "backend", lambda name: forced.append(name) or real(name))
    images, texts = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    losses = [training.contrast(loss, images, texts, torch.tensor(5.0)) for loss in ("fastvlm", "dense")]
    assert forced == ["dense"]
    torch.testing.assert_close(*losses)


def test_equal_captions_are_no_false_negatives():
    features = torch.eye(3)[[0, 0, 1]]
    ids = torch.tensor([7, 7, 3])
    with_ids = training.contrast("fastvlm", features, features, torch.tensor(50.0), ids)
    without = training.contrast("fastvlm", features, features, torch.tensor(50.0))
    assert with_ids < 1e-6 and without > 0.4


def test_scale_starts_right_stays_in_bounds_and_is_not_decayed(splits):
    run = Run.begin(SMALL, splits.train, CPU)
    assert run.model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    for raw, wanted in ((-1.0, 1.0), (9.0, 100.0)):
        with torch.no_grad():
            run.model.log_scale.fill_(raw)
        run.model.clamp_logit_scale()
        assert run.model.logit_scale.item() == pytest.approx(wanted, rel=1e-5)
    for group in run.optimizer.param_groups:
        if any(parameter is run.model.log_scale for parameter in group["params"]):
            assert group["weight_decay"] == 0
    assert run.model.log_scale.dtype == torch.float32


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(replace(SMALL, steps=100, lr=2.0), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0, abs=1e-12)


def test_weights_depend_on_the_seed_and_leave_the_global_stream_alone(splits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (Run.begin(replace(SMALL, seed=seed), splits.train, CPU).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.image.project.weight, b.image.project.weight)
    assert not torch.equal(a.image.project.weight, c.image.project.weight)


def test_fifty_steps_on_shapes_retrieve_far_above_chance():
    splits = shapes.load(train=50 * 256, test=1000, size=48)
    run = advanced(Run.begin(Config(data="shapes", steps=50), splits.train, CPU), splits, 50)
    result = retrieval(*encode(run.model, run.tokenizer, splits.test, CPU), splits.test.ids)
    assert result.count == 1000 and len(set(splits.test.captions)) == 1000
    assert min(result.image_to_text[2], result.text_to_image[2]) >= 50
    assert run.curves["loss"][-1] < 2.0 < 5.0 < run.curves["loss"][0]


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"sve_bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_is_fast_where_the_cpu_has_instructions_for_it(monkeypatch, capabilities, fast):
    """AVX-512 alone has none: bf16 products are emulated there, 3.5 times slower than fp32's."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_bf16(torch.device("cpu")) is fast
