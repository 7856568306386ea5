"""Texts in groups of like length: the same results, in fewer products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvlm_loss.trainer.model import VLPretrainModel, preset
from fastvlm_loss.trainer.model.config import Vocabulary
from fastvlm_loss.trainer.model.lengths import by_length


def _mask(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("lengths", [[3, 1, 6, 2, 2, 5, 4], [6] * 8, [1, 0, 0, 0, 0], [4, 2], [5], []])
def test_the_rows_are_those_of_one_call(lengths: list[int]) -> None:
    mask, g = _mask(lengths, 6), torch.Generator().manual_seed(0)
    hidden = torch.randn(len(lengths), 6, 3, generator=g, requires_grad=True)
    more = torch.randn(len(lengths), generator=g)

    def run(mask: Tensor, hidden: Tensor, more: Tensor, none: None) -> Tensor:
        assert none is None
        mean = (hidden * mask[..., None]).sum(1, keepdim=True)
        return (mean + hidden.sin() * more[:, None, None]) * mask[..., None]

    made, wanted = by_length(run, mask, (hidden,), (more, None)), run(mask, hidden, more, None)
    torch.testing.assert_close(made, wanted)
    cotangent = torch.randn(made.shape, generator=g)
    gradients = [torch.autograd.grad(out, hidden, cotangent, retain_graph=True)[0] for out in (made, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.fixture(scope="module")
def model() -> VLPretrainModel:
    torch.manual_seed(0)
    return VLPretrainModel(preset("tiny"), Vocabulary(50))


@pytest.mark.parametrize("prefix", [None, 1, 3, 9])
def test_texts_of_many_lengths_are_read_as_if_each_were_alone(model: VLPretrainModel, prefix: int | None) -> None:
    lengths = [9, 2, 4, 9, 3, 7, 2, 5]
    mask, tokens = _mask(lengths, 9), torch.randint(5, 50, (8, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.randn(8, 3, model.config.text.width, generator=torch.Generator().manual_seed(2))
    prefixes = None if prefix is None else torch.full((8,), prefix)
    read = model("text", tokens, mask, prefixes)
    fused = model("fuse", read["hidden"], mask, seen, prefixes)
    for i, n in enumerate(lengths):
        row, own = slice(i, i + 1), None if prefixes is None else prefixes[:1]
        alone = model("text", tokens[row, :n], mask[row, :n], own)
        torch.testing.assert_close(read["hidden"][row, :n], alone["hidden"])
        torch.testing.assert_close(read["features"][row], alone["features"])
        torch.testing.assert_close(fused[row, :n], model("fuse", alone["hidden"], mask[row, :n], seen[row], own))


def test_one_long_text_does_not_make_the_others_long(model: VLPretrainModel) -> None:
    def products(lengths: list[int], rows: int) -> int:
        mask = _mask(lengths, 32)[:rows]
        with FlopCounterMode(display=False) as counted:
            model("text", torch.full(mask.shape, 7), mask)
        return counted.get_total_flops()

    short, all_long = [4] * 63 + [32], [32] * 64  # a quarter of the rows lies beside the long one
    assert products(short, 64) < 0.4 * products(all_long, 64)
