"""sentence-transformers' in-batch negatives losses and ours: every option, processes, and its own trainer."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
from drop_in_cases import NoMatrix, agree, evaluated, run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("sentence_transformers")
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as theirs

from benchmarks.dropin.sentence_transformers import texts, tiny_model, trained
from fastvlm_loss.integrations import sentence_transformers as ours

MORE = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *d) for r in range(4) for d in itertools.combinations(MORE, r)]
MODEL = torch.nn.Sequential(torch.nn.Identity())  # which losses of embeddings do not ask
HARDNESS = [(None, 0.0), ("in_batch_negatives", 4.0), ("hard_negatives", 3.0), ("all_negatives", 5.0)]
# each combination of directions that may be partitioned so
PARTITIONS = [(d, "joint") for d in DIRECTIONS] + [(d, "per_direction") for d in DIRECTIONS if not {*d} & {*MORE[::2]}]


def columns(n, count, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def both(name="MultipleNegativesRankingLoss", **options):
    """Functions of the embeddings of the columns."""
    found = [getattr(module, name)(MODEL, **options) for module in (ours, theirs)]
    if "Cached" in name:
        return [lambda *e, loss=loss: loss.calculate_loss([list(c.split(3)) for c in e]) for loss in found]
    return [lambda *e, loss=loss: loss.compute_loss_from_embeddings(list(e), None) for loss in found]


@pytest.mark.parametrize("hardness", HARDNESS, ids=lambda h: str(h[0]))
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS)
def test_every_option_has_the_same_loss_and_gradients(directions, partition, hardness):
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": hardness[0]}
    options["hardness_strength"] = hardness[1]
    for similarity, scale in ((util.cos_sim, 20.0), (util.dot_score, 0.3)):
        one, other = both(scale=scale, similarity_fct=similarity, **options)
        for n, count in ((1, 2), (2, 3), (13, 2), (13, 4)):
            agree(one, other, columns(n, count))
        agree(one, other, columns(13, 4, dtype=torch.float32))


@pytest.mark.parametrize("hardness", HARDNESS, ids=lambda h: str(h[0]))
def test_the_cached_loss_is_the_same(hardness):
    for directions, partition in PARTITIONS:
        options = {"directions": directions, "partition_mode": partition, "mini_batch_size": 4}
        one, other = both(
            "CachedMultipleNegativesRankingLoss", hardness_mode=hardness[0], hardness_strength=hardness[1], **options
        )
        agree(one, other, columns(11, 3))


def test_the_cached_loss_goes_backward_itself():
    loss = ours.CachedMultipleNegativesRankingLoss(MODEL, scale=7.0)
    leaves = [t.requires_grad_() for t in columns(9, 3)]
    value = loss.calculate_loss([list(t.split(4)) for t in leaves], with_backward=True)
    assert not value.requires_grad
    want, gradients = evaluated(both(scale=7.0)[1], leaves)
    assert torch.allclose(value, want)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.allclose(leaf.grad, gradient)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_they_are_theirs_and_are_described_as_theirs(name):
    options = {"scale": 5.0, "directions": ("query_to_doc", "doc_to_query"), "hardness_mode": "all_negatives"}
    one, other = (getattr(module, name)(MODEL, hardness_strength=2.0, **options) for module in (ours, theirs))
    assert isinstance(one, getattr(theirs, name))
    assert one.get_config_dict() == other.get_config_dict()
    assert (one.temperature, one.citation) == (other.temperature, other.citation)
    one.scale = other.scale = 9.0  # options may change later on
    if name.startswith("Multiple"):
        agree(*(lambda *e, m=m: m.compute_loss_from_embeddings(list(e), None) for m in (one, other)), columns(6, 2))
    else:
        agree(*(lambda *e, m=m: m.calculate_loss([[c] for c in e]) for m in (one, other)), columns(6, 2))


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_other_similarities_are_refused_by_name(name):
    wanted = "similarity_fct: got manhattan_sim, wanted cos_sim or dot_score"
    with pytest.raises(ValueError, match=wanted):
        getattr(ours, name)(MODEL, similarity_fct=util.manhattan_sim)
    loss = getattr(ours, name)(MODEL)
    loss.similarity_fct = util.manhattan_sim
    with pytest.raises(ValueError, match=wanted):
        loss.calculate_loss([[t] for t in columns(3, 2)]) if "Cached" in name else (
            loss.compute_loss_from_embeddings(columns(3, 2))
        )


def test_what_they_refuse_is_refused():
    for options in (
        {"directions": ()}, {"directions": ("doc_to_query",)}, {"scale": 0}, {"partition_mode": "x"},
        {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}, {"hardness_mode": "x"},
        {"hardness_strength": -1.0},
    ):  # fmt: skip
        for module in (ours, theirs):
            with pytest.raises(ValueError):
                module.MultipleNegativesRankingLoss(MODEL, **options)


def test_columns_that_do_not_fit_are_refused():
    loss = ours.MultipleNegativesRankingLoss(MODEL)
    with pytest.raises(ValueError, match="embeddings: got 1 columns, wanted queries and documents"):
        loss.compute_loss_from_embeddings(columns(3, 1))
    with pytest.raises(ValueError, match=r"embeddings: got \[\[3, 8\], \[4, 8\]\], wanted columns of one shape"):
        loss.compute_loss_from_embeddings([*columns(3, 1), *columns(4, 1)])


@pytest.mark.parametrize("directions", [DIRECTIONS[0], DIRECTIONS[-1]], ids=["default", "all"])
def test_under_autocast_it_is_nearer_to_fp32(directions):
    for mode, strength in HARDNESS:
        one, other = both(directions=directions, hardness_mode=mode, hardness_strength=strength)
        given = columns(40, 3, d=24, dtype=torch.float32)
        exact = other(*given)
        with torch.autocast("cpu", torch.bfloat16):
            (got, gradients), want = evaluated(one, given), other(*given)
        assert got.dtype == torch.float32
        assert (got - exact).abs() <= 2 * (want - exact).abs() + 2**-8
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_no_matrix_is_built(name):
    n = 1100
    given = [t.requires_grad_() for t in columns(n, 3, dtype=torch.float32)]
    for mode, strength in HARDNESS:
        loss = both(name, directions=DIRECTIONS[-1], hardness_mode=mode, hardness_strength=strength)[0]
        with NoMatrix(n * n):
            loss(*given).backward()
    with pytest.raises(AssertionError, match="returned"), NoMatrix(n * n):
        both()[1](*given)


def gathered(rank, world):
    """Where loss or gradients differ in this process, and the error of batches of different sizes."""
    wrong = []
    for directions, partition in (PARTITIONS[0], PARTITIONS[7], PARTITIONS[-1]):
        for mode, strength in HARDNESS:
            for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
                for count in (2, 4):
                    options = {"directions": directions, "partition_mode": partition, "hardness_mode": mode}
                    one, other = both(name, hardness_strength=strength, gather_across_devices=True, **options)
                    given = columns(6, count, seed=rank)
                    (a, da), (b, db) = evaluated(one, given), evaluated(other, given)
                    off = [(g - h).abs().max().item() for g, h in zip((a, *da), (b, *db), strict=True)]
                    wrong += [(options, name, count, off)] if max(off) > 1e-9 else []
    sizes = (3, 6)
    parts = [columns(n, 3, seed=n) for n in sizes]
    whole, hard = [torch.cat(c) for c in zip(*parts, strict=True)], dict(hardness_mode=HARDNESS[3][0])
    options = {"directions": DIRECTIONS[-1], "hardness_strength": 4.0, **hard}
    share = both(gather_across_devices=True, **options)[0](*parts[rank]) * sizes[rank]
    dist.all_reduce(share)
    want = both(**options)[1](*whole) * sum(sizes)
    return wrong, abs(share - want).item()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_agree_with_theirs():
    for wrong, of_sizes in run(2, gathered):
        assert not wrong
        assert of_sizes < 1e-9


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_its_trainer_learns_the_same(name, tmp_path):
    options = {"directions": DIRECTIONS[-1]} if name.startswith("Multiple") else {"mini_batch_size": 5}
    curves = [trained(getattr(module, name), options, tmp_path / str(k)) for k, module in enumerate((ours, theirs))]
    assert len(curves[0]) == len(curves[1]) == 16
    assert curves[0][-1] < curves[0][0] - 0.3
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-6  # which the trainer keeps in fp32


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "GISTEmbedLoss"]
)
def test_several_dimensions_as_theirs(name, tmp_path):
    """Under the package's MatryoshkaLoss, which decorates the model or the loss."""
    model, rows, found = tiny_model(tmp_path).double(), texts(10), []
    for module in (ours, theirs):
        loss = getattr(module, name)(model, **({"guide": model} if name == "GISTEmbedLoss" else {}))
        several = theirs.MatryoshkaLoss(model, loss, [24, 12, 6])
        value = several([model.preprocess(rows[column]) for column in rows.column_names], None)
        model.zero_grad()
        value.backward()
        found.append((value.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert abs(found[0][0] - found[1][0]) < 1e-9
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
