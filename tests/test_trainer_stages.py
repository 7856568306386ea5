"""Stages: boundaries, weights along points, presets, and errors that name what is wrong."""

import pytest

from fastvlm_loss.trainer.config import Config, StageConfig
from fastvlm_loss.trainer.stages import GROUPS, PRESETS, boundaries, stages_of


@pytest.mark.parametrize(
    ("steps", "ends"), [(7, [2, 6, 7]), (10, [3, 8, 10]), (1001, [300, 801, 1001])], ids=["7", "10", "1001"]
)
def test_boundaries_are_rounded_sums(steps, ends):
    assert boundaries(steps, [0.3, 0.5, 0.2]) == ends


def test_every_step_belongs_to_one_stage():
    stages = stages_of(Config(steps=101, schedule="30/50/20"))
    assert [(s.start, s.end) for s in stages] == [(0, 30), (30, 81), (81, 101)]
    assert [s.name for s in stages] == ["contrast", "fusion", "tasks"]


def test_weights_follow_their_points():
    stage = StageConfig("only", 1.0, {"itc": 1.0, "itm": [(0.0, 0.0), (0.5, 1.0), (1.0, 0.5)]})
    (found,) = stages_of(Config(steps=101, stages=(stage,)))
    assert found.weights(0) == {"itc": 1.0}, "an objective of weight 0 is not computed"
    assert found.weights(25)["itm"] == pytest.approx(0.5)
    assert found.weights(50)["itm"] == pytest.approx(1.0)
    assert found.weights(100)["itm"] == pytest.approx(0.5)
    assert found.tasks == ("itc", "itm"), "it counts somewhere in the stage"


def test_the_run_scales_built_in_stages_and_leaves_own_ones():
    weights = {"itc": 2.0, "mlm": 0.5}
    built = stages_of(Config(weights=weights))[0]
    assert built.weights(0) == {"itc": 2.0, "mlm": 0.5}
    own = stages_of(Config(weights=weights, stages=(StageConfig("own", 1.0, {"itm": 3.0}),)))[0]
    assert own.weights(0) == {"itm": 3.0}


def test_presets_train_what_is_said_of_them():
    first, second, third = (stage.train or GROUPS for stage in PRESETS["30/50/20"])
    assert "vision" in first and "fusion" not in first
    assert "vision" not in second and "fusion" in second
    assert third == GROUPS
    assert all("scale" in train for train in (first, second, third)), (
        "the temperature learns wherever there is contrast"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(schedule="50/50"), "schedule: got '50/50', wanted one of single"),
        (dict(weights={"itx": 1.0}), "weights: got itx, wanted objectives out of itc"),
        (dict(stages=(StageConfig("a", 0.5, {"itc": 1.0}),)), r"stages: got fractions \[0.5\] of sum 0.5"),
        (dict(steps=2, schedule="30/50/20"), r"stages\[2\]: got 0.2 of 2 steps, wanted at least one"),
        (dict(stages=(StageConfig("a", 1.0, {}),)), r"stages\[0\].weights: got nothing above 0"),
        (dict(stages=(StageConfig("a", 1.0, {"itc": 1.0}, ("visoin",)),)), r"stages\[0\].train: got visoin, wanted"),
        (dict(stages=(StageConfig("a", 1.0, {"itc": -1.0}),)), r"stages\[0\].weights"),
        (dict(stages=(StageConfig("a", 1.0, {"itc": [(1.0, 1.0), (0.0, 1.0)]}),)), "at shares in ascending order"),
        (dict(stages=(StageConfig("a", 1.0, {"itc": [(0.0, 0.0), (1.0, 1.0)]}),)), "got steps where all are 0"),
        (dict(stages=(StageConfig("a", 1.0, {"itc": 1.0, "mlm": []}),)), r"weights.mlm: got \[\], wanted values"),
    ],
)
def test_errors_name_the_value(config, message):
    with pytest.raises(ValueError, match=message):
        stages_of(Config(**config))
