"""open_clip's own training entry point learns the same with our losses in the place of its own."""

import pytest

from benchmarks.dropin.open_clip import KINDS, curve

WAYS = [(kind, ()) for kind in KINDS]
WAYS += [("ClipLoss", ("--accum-freq", "2")), ("ClipLoss", ("--precision", "amp_bf16"))]
WAYS += [pytest.param("ClipLoss", ("--torchcompile",), marks=pytest.mark.slow)]


def test_the_synthetic_mode_too(tmp_path):
    synthetic = ("--dataset-type", "synthetic", "--train-num-samples", "32")  # the same pair over and over
    want, got = (curve("ClipLoss", ours, tmp_path, more=synthetic) for ours in (False, True))
    assert len(want) == 2 and got == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize(("kind", "more"), WAYS, ids=lambda v: v if isinstance(v, str) else " ".join(v) or "plain")
def test_the_curve_of_losses_is_that_of_open_clip(kind, more, tmp_path):
    want, got = (curve(kind, ours, tmp_path, steps=4, more=more) for ours in (False, True))
    assert len(want) == 4 and want[-1] != want[0]
    assert got == pytest.approx(want, rel=2**-8 if "amp_bf16" in more else 2e-5)  # there open_clip rounds scores
