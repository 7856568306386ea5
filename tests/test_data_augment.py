"""Pictures drawn anew: each by its own numbers, and not at all where they are 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvlm_loss.data.augment import DICE, RESTYLE_DICE, restyle, shake


def _pictures(count: int) -> tuple[Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 24, 24, 3), generator=g, dtype=torch.uint8), g


@pytest.mark.parametrize(("change", "count"), [(shake, DICE), (restyle, RESTYLE_DICE)])
def test_a_picture_is_changed_by_its_own_numbers_alone(change, count):
    images, g = _pictures(7)
    dice = torch.rand(count, 7, generator=g) * 2 - 1
    together = change(images, dice)
    assert together.shape == images.shape and together.dtype == torch.uint8
    for i in range(7):
        assert torch.equal(change(images[i : i + 1], dice[:, i : i + 1])[0], together[i])
        assert not torch.equal(together[i], images[i])


@pytest.mark.parametrize(("change", "count"), [(shake, DICE), (restyle, RESTYLE_DICE)])
def test_the_middle_of_all_numbers_changes_nothing(change, count):
    images, _ = _pictures(3)
    assert (change(images, torch.zeros(count, 3)).int() - images.int()).abs().max() <= 1


def _changed(**numbers: float) -> tuple[Tensor, Tensor]:
    """A picture before and after, fp32."""
    images, _ = _pictures(1)
    dice = torch.zeros(RESTYLE_DICE, 1)
    names = ("edge", "gamma", "hue", "right", "down", "grey", "size", "x", "y")
    for name, value in numbers.items():
        dice[names.index(name)] = value
    return images[0].float(), restyle(images, dice)[0].float()


def test_each_number_does_what_its_name_says():
    before, after = _changed(edge=1.0)
    rough = [picture.diff(dim=1).abs().mean() for picture in (before, after, _changed(edge=-1.0)[1])]
    assert rough[1] < 0.5 * rough[0] < 0.5 * rough[2]
    before, after = _changed(hue=1.0)
    assert not torch.allclose(before, after, atol=20)
    inside = (after > 0) & (after < 255)
    kept = inside.all(2)  # what was not cut at black or white keeps its mean over the colours
    torch.testing.assert_close(before.mean(2)[kept], after.mean(2)[kept], atol=1.0, rtol=0)
    assert all(torch.equal(c, _changed(grey=1.0)[1][..., 0]) for c in _changed(grey=1.0)[1].unbind(2))
    before, after = _changed(gamma=1.0)
    assert (after <= before).all() and after.mean() < 0.9 * before.mean()
    before, after = _changed(right=1.0)
    assert after[:, :6].mean() < before[:, :6].mean() and after[:, -6:].mean() > before[:, -6:].mean()
    before, after = _changed(size=1.0)
    same = (before - after).abs().amax(2) <= 1
    assert (~same[8:16, 8:16]).float().mean() > 0.9 and same[:5].all() and same[:, :5].all(), "the middle is covered"
    assert torch.equal(_changed(size=-1.0)[1], before)
