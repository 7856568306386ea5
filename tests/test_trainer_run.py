"""A run from beginning to end: it learns, resumes bit for bit, keeps what it should, and says what is wrong."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_cases import ALL, LOCAL, config, same, train, weights

from fastvlm_loss.trainer.checkpoint import CheckpointError
from fastvlm_loss.trainer.config import (
    CheckpointConfig,
    ContrastiveConfig,
    MaskedConfig,
    MatchingConfig,
    MomentumConfig,
    OptimizerConfig,
    StageConfig,
    WeightingConfig,
)
from fastvlm_loss.trainer.objectives import contrastive_losses
from fastvlm_loss.trainer.progress import read
from fastvlm_loss.trainer.run import Run, _differences
from fastvlm_loss.trainer.world import World

HERE = World(torch.device("cpu"))
STAGES = (
    StageConfig("contrast", 0.5, {"itc": 1.0}, ("vision", "text", "projection", "scale")),
    StageConfig("rest", 0.5, ALL, ("text", "fusion", "heads", "projection", "scale")),
)


def records(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(run.folder) if "raw" in line]


def until(made, step):
    """A run that is stopped after `step` steps, as by SIGTERM."""
    run = Run(made, HERE)
    assert run.train(lambda: run.step == step) is None
    return run


OPTIONS = {
    "all objectives": {},
    "two stages": {"stages": STAGES},
    "gradient caching": {"micro_batch": 5},
    "momentum": {"momentum": MomentumConfig(enabled=True, ramp=0.5)},
    "queue": {"momentum": MomentumConfig(enabled=True, queue=24)},
    "inverse, hard words": {"weighting": WeightingConfig("inverse"), "mlm": MaskedConfig("hard")},
    "uncertainty": {"weighting": WeightingConfig("uncertainty")},
    "gradnorm": {"weighting": WeightingConfig("gradnorm")},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(tmp_path, options):
    whole = train(config(tmp_path / "whole", **options))
    until(config(tmp_path / "parts", **options), 2)
    until(config(tmp_path / "parts", resume="auto", **options), 4)
    parts = train(config(tmp_path / "parts", resume="auto", **options))
    assert parts.step == whole.step == 6
    assert same(weights(parts), weights(whole))
    assert records(parts) == records(whole), "no step is missing, twice, or different"


def test_every_objective_alone_learns_and_costs_nothing_else(tmp_path):
    for task in ALL:
        run = train(config(tmp_path / task, steps=3, weights={task: 1.0}))
        assert all(set(line["raw"]) == {task} for line in records(run))
        own = {"itm": "match", **dict.fromkeys(("mlm", "caption", "vqa"), "words"), **{n: n for n in LOCAL}}.get(task)
        learns = {name for name, p in run.source.named_parameters() if p.requires_grad}
        assert {name.split(".")[1] for name in learns if name.startswith("heads.")} == ({own} - {None})
        assert any(name.startswith("fusion.") for name in learns) == (own in ("match", "words"))
        assert any(name.startswith("summary.") for name in learns) == (own is not None)


LOSSES = sorted(contrastive_losses())


@pytest.mark.parametrize("name", LOSSES)
def test_every_contrastive_loss_trains_by_its_name(tmp_path, name):
    teacher = MomentumConfig(enabled=name == "soft_target_clip_loss")
    made = config(tmp_path, steps=2, itc=ContrastiveConfig(name), momentum=teacher, weights={"itc": 1.0, "itm": 1.0})
    before = weights(Run(made, HERE))
    run = train(made)
    assert all(not line["skipped"] and math.isfinite(line["raw"]["itc"]) for line in records(run))
    assert not torch.equal(weights(run)["image_projection.weight"], before["image_projection.weight"])


def test_evaluation_wants_something_to_evaluate(tmp_path):
    with pytest.raises(CheckpointError, match="without a checkpoint, wanted one to evaluate"):
        Run(config(tmp_path, resume="auto"), HERE).evaluate()


def test_all_objectives_go_down(tmp_path):
    lines = records(train(config(tmp_path, steps=60)))
    first, last = ({t: sum(line["raw"][t] for line in part) / 10 for t in ALL} for part in (lines[:10], lines[-10:]))
    for task in ("itc", "mlm", "caption", "vqa"):
        assert last[task] < 0.9 * first[task], f"{task}: {first[task]:.2f} to {last[task]:.2f}"
    assert first["itm"] == pytest.approx(math.log(2), abs=0.15)


def gradients(run):
    """Of a run of one step, from AdamW's first moment."""
    return {name: state["exp_avg"] / 0.1 for name, state in run.learning.state.items()}


@pytest.mark.parametrize("options", [{"micro_batch": 5}, {"checkpointing": True}], ids=["caching", "checkpointing"])
def test_gradients_are_those_of_the_whole_batch(tmp_path, options):
    one = replace(config(tmp_path).optimizer, clip=0.0)
    plain, other = (
        gradients(train(config(tmp_path / str(bool(more)), steps=1, optimizer=one, **more))) for more in ({}, options)
    )
    assert plain.keys() == other.keys() and len(plain) > 50
    for name, gradient in plain.items():
        error, size = (other[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-4 * size + 1e-7, f"{name}: off by {error:.1e} of {size:.1e}"


def test_frozen_groups_do_not_move(tmp_path):
    run = Run(config(tmp_path, stages=STAGES), HERE)
    seen = []
    run.train(lambda: seen.append((run.stage.name, weights(run))) or False)
    by_stage = {name: [w for stage, w in seen if stage == name] for name in ("contrast", "rest")}
    contrast, rest = by_stage["contrast"], by_stage["rest"]
    moved = lambda a, b: {name.partition(".")[0] for name in a if not torch.equal(a[name], b[name])}  # noqa: E731
    assert "fusion" not in moved(contrast[0], contrast[-1]) and "image" in moved(contrast[0], contrast[-1])
    assert "image" not in moved(rest[0], rest[-1]) and {"text", "fusion", "heads"} <= moved(rest[0], rest[-1])


def test_state_of_the_optimiser_survives_a_stage_where_the_parameter_does(tmp_path):
    run = train(config(tmp_path, stages=STAGES))
    state = run.learning.state
    assert int(state["text.embeddings.word_embeddings.weight"]["step"]) == 6
    assert int(state["heads.match.head.outer.weight"]["step"]) == 3
    assert not [name for name in state if name.startswith("image.")], "what is frozen has none"


def test_a_checkpoint_has_no_pickle_and_loads_without_the_trainer(tmp_path):
    from fastvlm_loss.trainer.model import VLPretrainModel

    run = train(config(tmp_path))
    (path,) = tmp_path.glob("step_*")
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".safetensors", ".json"}
    assert same(VLPretrainModel.load(path).state_dict(), weights(run))
    meta = json.loads((path / "meta.json").read_text())
    assert meta["step"] == 6 and meta["samples"] == 96 and meta["versions"]["torch"] == torch.__version__
    assert meta["hardness"] == 1.0 and meta["weights"] == ALL


@pytest.mark.parametrize("kind", ["inverse", "uncertainty", "gradnorm"])
def test_a_checkpoint_says_the_weights_of_its_last_step(tmp_path, kind):
    random = MatchingConfig(random=True)
    run = train(
        config(tmp_path, weighting=WeightingConfig(kind, lr=0.5), optimizer=OptimizerConfig(lr=0.1), itm=random)
    )
    meta = json.loads((next(tmp_path.glob("step_*")) / "meta.json").read_text())
    last = records(run)[-1]
    assert meta["weights"] == pytest.approx({task: last["weighted"][task] / last["raw"][task] for task in ALL})
    assert meta["hardness"] == 0.0, "uniform draws"


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, capsys):
    made = config(tmp_path, checkpoint=CheckpointConfig(every=2, keep=3))
    whole = train(made)
    newest, before = sorted(tmp_path.glob("step_*"), reverse=True)[:2]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[: len(content) // 2])
    run = Run(replace(made, resume="auto"), HERE)
    assert run.step == 4
    error = capsys.readouterr().err
    assert "step_00000006: model.safetensors is damaged" in error and "the one before it" in error
    run.train()
    assert same(weights(run), weights(whole))
    for path in (newest, before, *tmp_path.glob("step_*")):
        (path / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        Run(replace(made, resume="auto"), HERE)


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    run = train(config(tmp_path, steps=6, checkpoint=CheckpointConfig(every=1, keep=2)))
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_00000005", "step_00000006"]
    assert run.best["step"] == json.loads((tmp_path / "best" / "meta.json").read_text())["step"] == 6


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path):
    train(config(tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"output: got .* which has checkpoints; wanted resume=auto or another folder"):
        Run(config(tmp_path, steps=1), HERE)


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    train(config(tmp_path))
    made = config(tmp_path, resume="auto", batch_size=8, seed=1)
    with pytest.raises(CheckpointError, match="other values of batch_size, seed, wanted the same"):
        Run(made, HERE)
    Run(config(tmp_path, resume="auto", threads=1, micro_batch=3), HERE)  # how, not what


def test_an_option_that_is_newer_than_a_run_had_its_default():
    old, new = (dataclasses.asdict(config(Path("somewhere"))) for _ in range(2))
    del old["data"]["restyle"], old["itm"]
    assert _differences(old, new) == []
    new["data"]["restyle"] = True
    new["itm"]["k"] = 5
    assert sorted(_differences(old, new)) == ["data.restyle", "itm.k"]


def test_auto_precision_is_resumed_as_what_it_was(tmp_path):
    """Another device's `auto` may be another precision: no other numbers than the run began with."""
    began = train(config(tmp_path, precision="auto")).precision
    assert Run(config(tmp_path, resume="auto", precision=began), HERE).precision == began
    other = {"bf16": "fp32", "fp32": "bf16"}[began]
    with pytest.raises(CheckpointError, match="other values of precision"):
        Run(config(tmp_path, resume="auto", precision=other), HERE)


def test_a_loss_that_is_not_finite_skips_the_step_and_ends_the_run_after_ten(tmp_path):
    run = Run(config(tmp_path, steps=20, weights={"itc": 1.0}), HERE)
    before = weights(run)
    with torch.no_grad():
        run.source.image_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"10 steps in a row .* optimizer.lr is 0.003, try less"):
        run.train()
    lines = records(run)
    assert len(lines) == 9 and all(line["skipped"] for line in lines)
    name = "text.embeddings.word_embeddings.weight"
    assert torch.equal(weights(run)[name], before[name])


def test_wrong_combinations_are_named(tmp_path):
    for changes, message in (
        (dict(precision="bf16", grad_scaler=True), "grad_scaler: got true beside precision=bf16"),
        (dict(itc=ContrastiveConfig("soft_target_clip_loss")), "itc.loss: got soft_target_clip_loss without a teacher"),
        (dict(itc=ContrastiveConfig(options={"nope": 1})), "itc.options: got nope, wanted options of clip_loss"),
        (dict(precision="fp16", grad_scaler=False), "grad_scaler: got false beside precision=fp16"),
        (dict(data=config(tmp_path).data.__class__(questions=False)), "weights.vqa"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(config(tmp_path, **changes), HERE)
