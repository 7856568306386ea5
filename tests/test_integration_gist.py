"""sentence-transformers' GISTEmbedLoss and ours: every option on the columns' embeddings, processes, its trainer."""

import os

import pytest
import torch
import torch.distributed as dist
from drop_in_cases import NoMatrix, agree, evaluated, run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses as theirs

from benchmarks.dropin.sentence_transformers import texts, tiny_model, trained
from fastvlm_loss.integrations import sentence_transformers as ours

SIDES = [(True, True), (True, False), (False, True), (False, False)]
MARGINS = [("absolute", 0.0), ("absolute", 0.1), ("absolute", -0.3), ("relative", 0.05), ("relative", -0.5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [tiny_model(tmp_path_factory.mktemp("models"), seed).double() for seed in (0, 1)]


def columns(n, count, d=8, dtype=torch.float64, seed=0, noise=0.5):
    """Embeddings that are near one another, so that a guide has something to find."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, d, generator=g, dtype=torch.float64)
    return [(common + noise * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype) for _ in range(count)]


class Embedded(torch.nn.Module):
    """Stands for a model: the embeddings are the features."""

    def __init__(self, like):
        super().__init__()
        self.tokenizer, self.max_seq_length = like.tokenizer, like.max_seq_length

    def forward(self, features):
        return {"sentence_embedding": features["own"]}


class Guide(Embedded):
    def forward(self, features):
        return {"sentence_embedding": features["guide"]}


def both(models, **options):
    """Functions of the columns' embeddings and, behind them, the guide's, through each `forward`."""
    found = [module.GISTEmbedLoss(Embedded(models[0]), Guide(models[0]), **options) for module in (ours, theirs)]

    def of(loss):
        def value(*given):
            half = len(given) // 2
            return loss([{"own": e, "guide": g} for e, g in zip(given[:half], given[half:], strict=True)], None)

        return value

    return [of(loss) for loss in found]


@pytest.mark.parametrize(("strategy", "margin"), MARGINS)
@pytest.mark.parametrize(("anchors", "positives"), SIDES)
def test_every_option_has_the_same_loss_and_gradients(models, anchors, positives, strategy, margin):
    for temperature in (0.01, 0.3):
        one, other = both(
            models, temperature=temperature, margin_strategy=strategy, margin=margin, contrast_anchors=anchors,
            contrast_positives=positives,
        )  # fmt: skip
        for n, count in ((1, 2), (2, 3), (14, 2), (14, 3)):
            agree(one, other, [*columns(n, count), *columns(n, count, 5, seed=9)])
        given = [*columns(14, 3, dtype=torch.float32), *columns(14, 3, 5, torch.float32, seed=9)]
        agree(one, other, given)


def test_the_guide_leaves_something_out(models):
    given, guide = columns(14, 2), columns(14, 2, 5, seed=9, noise=2.0)
    strict, loose = (both(models, temperature=0.3, margin=margin)[0] for margin in (0.0, -3.0))
    assert strict(*given, *guide) < loose(*given, *guide) - 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_texts_that_occur_twice_stay_as_theirs(models, dtype):
    """Their similarity is that of the positive: above it only by rounding."""
    one, other = both(models, temperature=0.3)
    twice = torch.arange(24) % 10
    given = [t[twice] for t in (*columns(10, 3, dtype=dtype), *columns(10, 3, 48, dtype, seed=9))]
    given[3] = given[4].clone()  # to the guide the positives are the anchors
    agree(one, other, given)


def test_the_encoders_run_as_theirs(models):
    """With the guide's own tokens and, where its vocabulary differs, with the texts tokenized anew."""
    rows = texts(10)
    for max_seq_length in (12, 8):  # a guide that takes less tokenizes anew
        models[1].max_seq_length = max_seq_length
        values = []
        for module in (ours, theirs):
            loss = module.GISTEmbedLoss(*models, temperature=0.1)
            assert loss.must_retokenize == (max_seq_length == 8)
            given = [models[0].preprocess(rows[name]) for name in rows.column_names]
            values.append(loss(given, None))
        assert abs(values[0] - values[1]).item() < 1e-9
    models[1].max_seq_length = 12
    assert isinstance(loss, theirs.GISTEmbedLoss)


def test_it_is_described_as_theirs(models):
    one, other = (module.GISTEmbedLoss(*models, margin=0.2, temperature=0.03) for module in (ours, theirs))
    assert isinstance(one, theirs.GISTEmbedLoss)
    assert one.get_config_dict() == other.get_config_dict()


def test_what_they_refuse_is_refused(models):
    with pytest.raises(ValueError, match="margin_strategy"):
        ours.GISTEmbedLoss(*models, margin_strategy="x")
    loss = ours.GISTEmbedLoss(*models)
    with pytest.raises(ValueError, match="embeddings: got 4 columns, wanted anchors, positives and maybe negatives"):
        loss.compute_loss_from_embeddings(columns(3, 4), columns(3, 4))
    with pytest.raises(ValueError, match=r"embeddings: got columns of \[3, 4\], wanted as many in each"):
        loss.compute_loss_from_embeddings([*columns(3, 1), *columns(4, 1)], columns(3, 2))


def test_under_autocast_it_is_theirs(models):
    one, other = both(models, temperature=0.1)
    given = [*columns(30, 3, dtype=torch.float32), *columns(30, 3, 5, torch.float32, seed=9)]
    with torch.autocast("cpu", torch.bfloat16):
        agree(one, other, given)


def test_no_matrix_is_built(models):
    n = 1100
    one, other = both(models)
    given = [*columns(n, 2, dtype=torch.float32), *columns(n, 2, 5, torch.float32)]
    with NoMatrix(n * n):
        evaluated(one, given)
    with pytest.raises(AssertionError, match="returned"), NoMatrix(n * n):
        other(*given)


def gathered(rank, world):
    """Where loss or gradients differ in this process."""
    wrong = []
    for anchors, positives in SIDES:
        for count in (2, 3):
            one, other = both(
                WITH, temperature=0.2, contrast_anchors=anchors, contrast_positives=positives,
                gather_across_devices=True,
            )  # fmt: skip
            given = [*columns(6, count, seed=rank), *columns(6, count, 5, seed=9 + rank)]
            (a, da), (b, db) = evaluated(one, given), evaluated(other, given)
            off = [(g - h).abs().max().item() for g, h in zip((a, *da), (b, *db), strict=True)]
            wrong += [(anchors, positives, count, off)] if max(off) > 1e-9 else []
    return wrong


WITH = []  # the models, for the processes


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_agree_with_theirs(models):
    WITH[:] = models
    assert not any(run(2, gathered))


def test_its_trainer_learns_the_same(models, tmp_path):
    options = {"guide": models[1], "temperature": 0.1}
    curves = [trained(getattr(m, "GISTEmbedLoss"), options, tmp_path / str(k)) for k, m in enumerate((ours, theirs))]  # noqa: B009
    assert curves[0][-1] < curves[0][0] - 0.3
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-6  # which the trainer keeps in fp32
