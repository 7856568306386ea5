"""Weights of the objectives: the published formulas, on numbers that are worked out by hand."""

import pytest
import torch

from fastvlm_loss.trainer.config import WeightingConfig
from fastvlm_loss.trainer.weighting import Weighting

TASKS = ("itc", "itm", "mlm")


def observed(kind, losses=(2.0, 0.5, 0.1), **options):
    weighting = Weighting(WeightingConfig(kind=kind, **options), TASKS)
    weighting.observe(dict(zip(TASKS, map(torch.tensor, losses), strict=True)))
    return weighting


def factors(weighting, tasks=TASKS, share=0.0):
    return [float(w) for w in weighting.factors(tasks, share).values()]


def test_fixed_is_the_plain_sum():
    assert factors(observed("fixed")) == [1.0, 1.0, 1.0]


def test_inverse_weights_sum_to_the_number_of_objectives():
    assert factors(observed("inverse")) == pytest.approx([3 * 0.04, 3 * 0.16, 3 * 0.8])


def test_inverse_gradient_does_not_depend_on_the_scale_of_a_loss():
    for scale in (1.0, 10.0):
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        losses = x.square() * torch.tensor([scale, 1.0, 1.0])
        weighting = observed("inverse", losses.detach().tolist())
        total = sum(w * loss for w, loss in zip(weighting.factors(TASKS, 0.0).values(), losses, strict=True))
        (gradient,) = torch.autograd.grad(total, x)
        direction = gradient / gradient.norm()
        assert direction.tolist() == pytest.approx((2 / x / (2 / x).norm()).tolist()), "of sum log L"


def test_inverse_is_smoothed_floored_and_capped():
    weighting = observed("inverse", (1.0, 1.0, 1.0))
    weighting.observe({"itc": torch.tensor(0.0)})
    assert float(weighting.smoothed[0]) == pytest.approx(0.9)
    tasks = ("itc", "itm", "mlm", "caption", "vqa")
    five = Weighting(WeightingConfig(kind="inverse", cap=4.0), tasks)
    five.observe(dict(zip(tasks, map(torch.tensor, (0.0, 1.0, 1.0, 1.0, 1.0)), strict=True)))
    assert factors(five, tasks)[0] == 4.0, "a loss of 0 takes no more than the cap"


def test_inverse_begins_with_equal_weights_and_one_objective_has_1():
    assert factors(Weighting(WeightingConfig(kind="inverse"), TASKS)) == [1.0, 1.0, 1.0]
    assert factors(observed("inverse"), ("mlm",)) == [1.0]


def test_curriculum_passes_its_boundaries_exactly():
    weighting = Weighting(WeightingConfig(kind="curriculum", boundaries=(0.25, 0.75)), (*TASKS, "caption"))
    assert factors(weighting, share=0.2499) == pytest.approx([1.0, 0.1, 0.1])
    assert factors(weighting, share=0.25) == pytest.approx([1.0, 1.0, 0.5])
    assert factors(weighting, share=0.75) == [1.0, 1.0, 1.0]
    assert factors(weighting, ("caption",), 0.0) == [1.0]


def test_uncertainty_is_at_rest_where_it_should_be():
    weighting = Weighting(WeightingConfig(kind="uncertainty"), TASKS)
    losses = torch.tensor([2.0, 0.5, 0.1])
    with torch.no_grad():
        weighting.log_variance[:3] = (2 * losses).log()
    total = sum(w * loss for w, loss in zip(weighting.factors(TASKS, 0.0).values(), losses, strict=True))
    total = total + weighting.regularizer(TASKS)
    (gradient,) = torch.autograd.grad(total, weighting.log_variance)
    assert gradient.abs().max() < 1e-6, "e^-s = 1 / (2 L)"
    assert total.item() == pytest.approx((0.5 + 0.5 * (2 * losses).log()).sum().item())


def test_uncertainty_gradient_is_half_less_the_weighted_loss():
    weighting = Weighting(WeightingConfig(kind="uncertainty"), TASKS)
    total = 3.0 * weighting.factors(["itm"], 0.0)["itm"] + weighting.regularizer(["itm"])
    (gradient,) = torch.autograd.grad(total, weighting.log_variance)
    assert gradient.tolist() == [0.0, 0.5 - 3.0, 0.0]


def test_gradnorm_brings_the_norms_together():
    weighting = Weighting(WeightingConfig(kind="gradnorm", lr=0.05), TASKS)
    slopes = torch.tensor([4.0, 1.0, 0.25])
    for _ in range(400):
        weighting.observe(dict.fromkeys(TASKS, torch.tensor(1.0)))
        w = torch.stack(list(weighting.factors(TASKS, 0.0).values()))
        weighting.rebalance(dict(zip(TASKS, w * slopes, strict=True)))
    w = torch.tensor(factors(weighting))
    assert float(w.sum()) == pytest.approx(3.0)
    assert (w * slopes).max() / (w * slopes).min() < 1.3, "all objectives train at a like pace: equal norms"


def test_a_checkpoint_holds_all_of_it():
    weighting = observed("uncertainty")
    other = Weighting(WeightingConfig(kind="uncertainty"), TASKS)
    other.load_state_dict(weighting.state_dict())
    assert torch.equal(other.smoothed[:3], weighting.smoothed[:3])
    assert set(weighting.state_dict()) == {"log_variance", "smoothed", "first", "balance"}
