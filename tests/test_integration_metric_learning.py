"""PyTorch Metric Learning's NTXentLoss and ours, with its reducers, wrappers and miners; our miner beside its."""

import pytest
import torch
import torch.distributed as dist
from drop_in_cases import BUDGET, NoMatrix, agree, evaluated, run

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices  # noqa: E402

from benchmarks.dropin.metric_learning import trained  # noqa: E402
from fastvlm_loss.integrations.metric_learning import HardNegativeMiner, NTXentLoss, Positives  # noqa: E402

LABELS = {
    "pairs": [0, 1, 2, 3, 4, 5] * 2,
    "uneven classes": [3, 3, 3, 3, 7, 7, -1, -1, -1, 2, 9, 9],  # one alone
    "one class": [1] * 12,
    "all alone": list(range(12)),
    "one pair": [0, 0, *range(1, 11)],
}


def features(n=12, d=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)


def both(**options):
    return NTXentLoss(**options), losses.NTXentLoss(**options)


def same(given, *rest, budget=None, **options):
    """Assert that both losses of `given` embeddings and the `rest` agree."""
    one, other = both(**options)
    agree(lambda *e: one(*e, *rest), lambda *e: other(*e, *rest), given, budget)


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_give_the_same_loss_and_gradients(labels, temperature, dtype):
    same([features(dtype=dtype)], torch.tensor(labels), temperature=temperature)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_references_give_the_same_loss_and_gradients(labels):
    one, other = both(temperature=0.2)
    queries, references = torch.tensor(labels), torch.tensor([0, 3, 3, 7, 1, 1, -1, 11, 2])
    for ref_labels in (references, None):
        given = [features(), features(9 if ref_labels is not None else 12, seed=1)]
        agree(*(lambda x, y, f=f: f(x, queries, None, y, ref_labels) for f in (one, other)), given)  # noqa: B023


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(symmetric):
    one, other = (losses.SelfSupervisedLoss(f, symmetric=symmetric) for f in both(temperature=0.1))
    for dtype in BUDGET:
        agree(one, other, [features(20, dtype=dtype), features(20, dtype=dtype, seed=1)])


MINERS = {
    "pairs": lambda: miners.PairMarginMiner(1.0, -1.0, distance=distances.CosineSimilarity()),
    "some pairs": lambda: miners.PairMarginMiner(0.1, 0.0, distance=distances.CosineSimilarity()),
    "triplets": lambda: miners.TripletMarginMiner(margin=0.3),
    "hard": lambda: miners.BatchEasyHardMiner("hard", "hard"),
    "all and hard": lambda: miners.BatchEasyHardMiner("all", "hard"),
    "similar": lambda: miners.MultiSimilarityMiner(),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_what_a_miner_found_gives_the_same_loss_and_gradients(miner, labels):
    labels = torch.tensor(labels)
    same([features()], labels, miner()(features(), labels), temperature=0.2)
    same([features(dtype=torch.float32)], None, miner()(features(), labels), temperature=0.2)


REDUCERS = {
    "sum": reducers.SumReducer(), "threshold": reducers.ThresholdReducer(low=1.0, high=6.0),
    "non-zero": reducers.AvgNonZeroReducer(), "class": reducers.ClassWeightedReducer(torch.rand(10).double()),
    "anchor": reducers.PerAnchorReducer(),
}  # fmt: skip


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
def test_reducers(reducer):
    for labels in ("pairs", "one pair", "all alone"):
        same([features()], torch.tensor(LABELS[labels]), reducer=reducer)
    labels = torch.tensor([3, 3, 3, 3, 7, 7, 1, 1, 1, 2, 9, 9])
    same([features()], labels, reducer=reducer)


def test_what_is_not_reduced_is_the_same_pair_by_pair():
    labels, found = torch.tensor(LABELS["uneven classes"]), []
    for loss in both(reducer=reducers.DoNothingReducer()):
        found.append(loss(features(), labels)["loss"])
    assert all(torch.equal(a, b) for a, b in zip(found[0]["indices"], found[1]["indices"], strict=True))
    assert torch.allclose(found[0]["losses"], found[1]["losses"], rtol=1e-9, atol=1e-9)


def test_a_regularizer():
    options = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    for labels in ("uneven classes", "all alone"):
        same([features()], torch.tensor(LABELS[labels]), **options)


@pytest.mark.parametrize(
    "distance", [distances.DotProductSimilarity(), distances.DotProductSimilarity(normalize_embeddings=False)]
)
def test_inner_products(distance):
    same([features() / 2], torch.tensor(LABELS["uneven classes"]), distance=distance, temperature=0.4)
    miner = HardNegativeMiner(distance=distance)
    expected = miners.BatchEasyHardMiner("all", "hard", distance=distance)
    _equal(miner(features(), torch.tensor(LABELS["pairs"])), expected(features(), torch.tensor(LABELS["pairs"])))


OTHERS = (distances.LpDistance(), distances.SNRDistance(), distances.CosineSimilarity(power=2))


@pytest.mark.parametrize("distance", OTHERS, ids=lambda d: f"{type(d).__name__} {d.power}")
def test_other_distances_are_the_packages_own_and_refused_by_the_miner(distance):
    same([features()], torch.tensor(LABELS["uneven classes"]), distance=distance, temperature=0.4)
    wanted = f"distance: got {type(distance).__name__} with power=[12], wanted CosineSimilarity or DotProduct"
    with pytest.raises(ValueError, match=wanted):
        HardNegativeMiner(distance=distance)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature: got"):
        NTXentLoss(temperature)


def test_neither_labels_nor_pairs_is_their_error():
    for loss in both():
        with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
            loss(features())


def test_statistics_are_theirs():
    found = []
    for loss in both(distance=distances.CosineSimilarity(collect_stats=True), collect_stats=True):
        loss(features(), torch.tensor(LABELS["pairs"]))
        found.append((loss._record_these, loss.distance.initial_avg_query_norm, loss.distance.final_avg_ref_norm))
    assert found[0] == found[1]
    assert isinstance(loss, losses.NTXentLoss)


def test_a_large_loss_goes_on_where_theirs_stops():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.1], [-1.0, 0.0]]), dim=1)
    labels = torch.tensor([0, 0, 1, 1])
    truth, _ = evaluated(lambda e: NTXentLoss(0.01)(e, labels), [x.double()])
    ours, gradients = evaluated(lambda e: NTXentLoss(0.01)(e, labels), [x])
    theirs = losses.NTXentLoss(0.01)(x, labels)
    assert theirs < 90 < 190 < truth
    assert abs(ours - truth) < 1e-5 * truth
    assert gradients[0].abs().max() > 1


def test_memory_of_past_batches():
    found = []
    for loss in both(temperature=0.2):
        memory, x, curve = losses.CrossBatchMemory(loss, 6, 30).double(), features().requires_grad_(), []
        for step in range(5):
            value = memory(x * (1 + step), torch.arange(12) % 4)
            curve += [value.item(), torch.autograd.grad(value, x)[0]]
        found.append(curve)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-9)


def test_under_autocast_it_is_nearer_to_fp32():
    labels, given = torch.arange(60) % 20, [features(60, 24, torch.float32)]
    one, other = both(temperature=0.1)
    exact = other(*given, labels)
    with torch.autocast("cpu", torch.bfloat16):
        (got, gradients), want = evaluated(lambda e: one(e, labels), given), other(*given, labels)
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (want - exact).abs() + 2**-8
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("classes", [1100, 100])
def test_no_matrix_is_built(classes):
    n = 2200
    labels, x = torch.arange(n) % classes, features(n, 8, torch.float32).requires_grad_()
    with NoMatrix(n * n):
        NTXentLoss()(x, labels).backward()
        mined = HardNegativeMiner(k=2)(x, labels)
        NTXentLoss()(x, labels, mined).backward()
    with pytest.raises(AssertionError, match="returned"), NoMatrix(n * n):
        miners.BatchEasyHardMiner("all", "hard")(x, labels)


def test_pairs_in_parts_have_the_same_gradients():
    """Where the positive pairs are many more than the embeddings."""
    same([features(60)], torch.arange(60) % 3, temperature=0.2)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_positive_pairs_are_theirs_in_their_order(labels):
    labels = torch.tensor(labels)
    for ref_labels in (None, labels, labels.clone(), torch.tensor([3, 3, 0, 12, -1, 3])):
        found = Positives.of(labels, ref_labels)
        a, p, a2, _ = get_all_pairs_indices(labels, ref_labels)
        _equal((found.anchor, found.positive), (a, p))
        assert torch.equal(found.negatives, a2.bincount(minlength=12))
        assert torch.equal(found.count, a.bincount(minlength=12))


def _equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("labels", [v for k, v in LABELS.items() if k != "one class"])
def test_the_miner_finds_the_hardest_as_theirs(labels):
    labels, cosine = torch.tensor(labels), distances.CosineSimilarity()
    theirs = miners.BatchEasyHardMiner("all", "hard", distance=cosine)
    _equal(HardNegativeMiner()(features(), labels), theirs(features(), labels))
    references = features(9, seed=1), torch.tensor([0, 3, 3, 7, 1, 1, -1, 11, 2])
    _equal(HardNegativeMiner()(features(), labels, *references), theirs(features(), labels, *references))
    assert isinstance(HardNegativeMiner(), miners.BaseMiner)


def test_the_miner_of_several_and_of_a_draw():
    labels, x = torch.arange(12) % 4, features()
    a, _, a2, n = HardNegativeMiner(k=20)(x, labels)
    assert len(a) == 24 and len(a2) == 12 * 9  # all there are
    assert (labels[a2] != labels[n]).all()
    drawing = HardNegativeMiner(k=2, hardness=1.0, seed=5)
    draws = [drawing(x, labels) for _ in range(2)]
    assert not torch.equal(draws[0][3], draws[1][3])  # each call another
    _equal(HardNegativeMiner(k=2, hardness=1.0, seed=5)(x, labels), draws[0])
    assert (labels[draws[0][2]] != labels[draws[0][3]]).all()
    with pytest.raises(ValueError, match="seed: got None"):
        HardNegativeMiner(hardness=1.0)(x, labels)


def test_the_miner_serves_their_triplets():
    labels, x, cosine = torch.arange(12) % 4, features(), distances.CosineSimilarity()
    mined = [m(x, labels) for m in (HardNegativeMiner(), miners.BatchEasyHardMiner("all", "hard", distance=cosine))]
    values = [losses.TripletMarginLoss()(x, labels, each) for each in mined]
    assert values[0] == values[1] > 0


def wrapped(rank, world):
    """The largest difference under the package's wrapper for several processes."""
    off = []
    for efficient in (False, True):
        for loss in (NTXentLoss, losses.NTXentLoss):
            both_ways = distributed.DistributedLossWrapper(loss(temperature=0.2), efficient=efficient)
            labels = torch.arange(12) % 4
            off.append(evaluated(lambda e: both_ways(e, labels), [features(seed=rank)]))  # noqa: B023
    return max((a - b).abs().max().item() for (v, g), (w, h) in zip(off[::2], off[1::2], strict=True)
               for a, b in ((v, w), (g[0], h[0])))  # fmt: skip


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_agree_with_theirs():
    assert max(run(2, wrapped)) < 1e-9


@pytest.mark.parametrize("mined", [False, True])
def test_a_training_is_the_same(mined):
    theirs = miners.BatchEasyHardMiner("all", "hard", distance=distances.CosineSimilarity())
    used = (HardNegativeMiner(), theirs) if mined else (None, None)
    curves = [trained(loss, miner) for loss, miner in zip(both(temperature=0.2), used, strict=True)]
    assert min(curves[0]) < curves[0][0] - 0.2
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-9
