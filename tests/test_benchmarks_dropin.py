"""The drop-in table: what the README shows is the saved result."""

import pytest
import torch

from benchmarks import readme
from benchmarks.dropin import __main__ as dropin
from benchmarks.dropin import layers


def test_the_readme_has_every_saved_result():
    text = readme.README.read_text()
    assert text == readme.splice(text, dropin.block(), *readme.DROPIN), "run: python -m benchmarks readme"


def test_a_row_says_the_largest_difference_and_who_died():
    assert dropin.difference([[2.0, 4.0], [2.0, 4.4]]) == pytest.approx(0.1)
    row = {
        "module": "lightly", "kind": "NTXentLoss", "package": "lightly", "version": "1.6.0",
        "curves": [[2.0, 4.0], [2.0, 4.4]], "seconds": None,
        "memory": ["you tried to allocate 4000000000 bytes. Error code 12", 5_000_000],
    }  # fmt: skip
    about = {"hardware": {"cpu": "C", "cores": 2, "instruction_set": None}, "versions": {"torch": "2"}, "date": "today"}
    line = dropin.markdown({"rows": [row], **about}).splitlines()[2]
    assert "1e-01, 2 steps" in line and "dies asking for 4 GB → 5 MB" in line


@pytest.mark.parametrize("layer", layers.LAYERS, ids=" ".join)
def test_a_layer_of_theirs_and_of_ours_is_the_same_loss(layer, monkeypatch):
    monkeypatch.setattr(layers, "D", 16)
    g = torch.Generator().manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(12, 16, generator=g), dim=1) for _ in range(2)]
    torch.manual_seed(0)
    want, got = (layers.LAYERS[layer](ours)(*features) for ours in (False, True))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
