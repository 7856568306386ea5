"""itm_batch: the pairs, their shares, the random order, and what happens where negatives are missing."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import BatchNegatives, FeatureQueue, HardNegatives, hard_negatives, itm_batch, itm_loss

PAGE = Path(__file__).parents[1] / "docs" / "itm.md"
MODES = ["sample", "weight", "albef"]
NONE = "negatives: got none that is valid"


def found(text, image):
    """Negatives as `hard_negatives` returns them, of index lists with -1 for none."""
    index = torch.tensor(text), torch.tensor(image)
    of = [part for i in index for part in (i, torch.zeros(i.shape), i >= 0)]
    return HardNegatives(*of, nonfinite=torch.tensor(0))


def others(b, k=1):
    """Every negative is there: the k next texts, the k last images."""
    text = [[(i + 1 + d) % b for d in range(k)] for i in range(b)]
    return found(text, [[(i - 1 - d) % b for d in range(k)] for i in range(b)])


def batch(negatives, mode, **options):
    """With a seed and a step where the mode wants them."""
    return itm_batch(negatives, mode=mode, **({"seed": 3, "step": 5} | options if mode == "sample" else options))


def table(pairs):
    return list(zip(*(t.tolist() for t in pairs), strict=True))


def wrong(pairs, negatives):
    """Which pairs have a wrong image, which a wrong text: as far as it is told by what `negatives` says of (i, i)."""
    text = torch.tensor([j in negatives.text_index[i] for i, j in zip(*pairs[:2], strict=True)])
    image = torch.tensor([i in negatives.image_index[j] for i, j in zip(*pairs[:2], strict=True)])
    return image & (pairs.labels == 0), text & (pairs.labels == 0)


def test_the_three_parts_in_order():
    negatives = others(3)
    rows = [(0, 0, 1), (1, 1, 1), (2, 2, 1), (2, 0, 0), (0, 1, 0), (1, 2, 0), (0, 1, 0), (1, 2, 0), (2, 0, 0)]
    assert table(batch(negatives, "weight")) == [(*row, 1.5 if row[2] else 0.75) for row in rows]
    assert table(batch(negatives, "albef")) == [(*row, 1.0) for row in rows]


def test_sample_takes_one_negative_of_each_anchor():
    for b in (2, 3, 7, 64, 101):
        # far apart, so that a pair tells whether its image or its text is the wrong one
        negatives = found([[(i + 1) % b] for i in range(b)], [[(i + 1) % b] for i in range(b)])
        pairs = batch(negatives, "sample")
        own = torch.arange(b)
        assert torch.equal(pairs.image_index[:b], own) and torch.equal(pairs.text_index[:b], own)
        image, text = pairs.image_index[b:], pairs.text_index[b:]
        to_image = text == own
        assert torch.equal(image, torch.where(to_image, (own + 1) % b, own))
        assert torch.equal(text, torch.where(to_image, own, (own + 1) % b))
        assert int(to_image.sum()) == b // 2
        assert pairs.labels.tolist() == [1] * b + [0] * b and pairs.weights.tolist() == [1.0] * 2 * b


def images_of(**draw):
    b = 40
    pairs = itm_batch(found([[(i + 1) % b] for i in range(b)], [[(i + 1) % b] for i in range(b)]), **draw)
    return pairs.text_index[b:] == torch.arange(b)


def test_the_order_is_a_function_of_seed_and_step():
    first = images_of(seed=1, step=0)
    assert torch.equal(first, images_of(seed=1, step=0))
    assert torch.equal(first, images_of(seed=1, step=torch.tensor(0)))
    for draw in (
        {"seed": 2, "step": 0},
        {"seed": 1, "step": 1},
        {"seed": 1, "step": 2**40},
        {"seed": 2**40, "step": 0},
    ):
        assert not torch.equal(first, images_of(**draw))


def test_every_anchor_gives_its_image_half_of_the_time():
    steps = 2000
    counts = sum(images_of(seed=7, step=step).double() for step in range(steps))
    # without replacement, 20 of 40: variance of each count is steps / 4, of their sum 0
    assert counts.sum() == 20 * steps
    chi = ((counts - steps / 2) ** 2 / (steps / 4)).sum() * 39 / 40
    assert 39 - 4.5 * (2 * 39) ** 0.5 < chi < 39 + 4.5 * (2 * 39) ** 0.5


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_mean_has_the_shares_of_the_composition(mode, k):
    b, shares = 12, (0.5, 0.25, 0.25)
    negatives = others(b, k)
    pairs = batch(negatives, mode)
    assert len(pairs.weights) == (b + b * k if mode == "sample" else b + 2 * b * k)
    losses = torch.randn(len(pairs.weights), generator=torch.Generator().manual_seed(0)).abs().double()
    of_image, of_text = wrong(pairs, negatives)
    if mode == "sample":
        means = [losses[:b].mean(), losses[b:].mean()]
        want = (means[0] + means[1]) / 2
    else:
        if mode == "albef":
            shares = tuple(s / (1 + 2 * k) for s in (1, k, k))
        want = sum(s * v.mean() for s, v in zip(shares, losses.split([b, b * k, b * k]), strict=True))
    mean = (pairs.weights * losses).mean()
    torch.testing.assert_close(mean, want, rtol=1e-6, atol=0)
    torch.testing.assert_close((pairs.weights * losses).sum() / pairs.weights.sum(), want, rtol=1e-6, atol=0)
    assert bool((of_image | of_text == (pairs.labels == 0)).all())


def test_half_the_mean_of_positives_and_quarters_of_the_others():
    b = 8
    pairs = batch(others(b), "weight")
    x = torch.randn(3 * b, 2, generator=torch.Generator().manual_seed(1)).double()
    each = F.cross_entropy(x, pairs.labels, reduction="none").split(b)
    want = each[0].mean() / 2 + each[1].mean() / 4 + each[2].mean() / 4
    torch.testing.assert_close(itm_loss(x, pairs.labels, pairs.weights), want)


@pytest.mark.parametrize("composition", [(0.4, 0.2, 0.4), (0.5, 0.0, 0.5), (0.25, 0.75, 0.0)])
def test_other_compositions(composition):
    b, k = 10, 2
    weights = batch(others(b, k), "weight", composition=composition).weights
    shares = [part.sum() / len(weights) for part in weights.split([b, b * k, b * k])]
    torch.testing.assert_close(torch.stack(shares), torch.tensor(composition))
    negatives = found([[(i + 1) % b] for i in range(b)], [[(i + 1) % b] for i in range(b)])
    pairs = batch(negatives, "sample", composition=composition)
    to_image = pairs.text_index[b:] == torch.arange(b)
    positive, image, text = composition
    assert int(to_image.sum()) == int(b * image / (image + text) + 1e-6)
    torch.testing.assert_close(pairs.weights[:b].sum() / (2 * b), torch.tensor(positive))
    torch.testing.assert_close(pairs.weights.mean(), torch.tensor(1.0))
    assert len(pairs.weights[b:].unique()) == 1


def test_albef_by_its_formula():
    """B positives, then text i with a wrong image, then image i with a wrong text; cross-entropy over all of them."""
    x, y = (F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    negatives = hard_negatives(x, y, seed=1, step=0)
    pairs = batch(negatives, "albef")

    def logits(image, text):  # any fusion encoder
        return torch.stack([image.sum(1), (image * text).sum(1)], 1)

    wrong_image, wrong_text = x[negatives.image_index[:, 0]], y[negatives.text_index[:, 0]]
    image, text = torch.cat([x, wrong_image, x]), torch.cat([y, y, wrong_text])
    label = torch.cat([torch.ones(9), torch.zeros(18)]).long()
    want = F.cross_entropy(logits(image, text), label)
    got = itm_loss(logits(x[pairs.image_index], y[pairs.text_index]), pairs.labels, pairs.weights)
    torch.testing.assert_close(got, want)


def test_a_missing_negative_is_its_positive_at_weight_zero_and_the_others_share_its_weight():
    negatives = found([[1], [-1], [0], [2]], [[3], [2], [-1], [-1]])
    pairs = batch(negatives, "weight")
    assert table(pairs)[4:] == [
        (3, 0, 0, 1.5), (2, 1, 0, 1.5), (2, 2, 1, 0.0), (3, 3, 1, 0.0),
        (0, 1, 0, 1.0), (1, 1, 1, 0.0), (2, 0, 0, 1.0), (3, 2, 0, 1.0),
    ]  # fmt: skip
    assert pairs.weights[:4].tolist() == [1.5] * 4
    several = found([[1, 2], [0, -1], [-1, -1]], [[1, 2], [0, 2], [0, 1]])
    assert batch(several, "weight").weights[9:].tolist() == [1.25, 1.25, 1.25, 0, 0, 0]


@pytest.mark.parametrize("mode", ["weight", "albef"])
def test_an_empty_kind_gives_its_weight_to_the_other(mode):
    none, full = [[-1]] * 4, [[1], [2], [3], [0]]
    for text, image in ((none, full), (full, none)):
        weights = batch(found(text, image), mode).weights
        positive, of_image, of_text = weights.split(4)
        kept, gone = (of_image, of_text) if text is none else (of_text, of_image)
        assert positive.tolist() == [1.5 if mode == "weight" else 1.0] * 4 and not gone.any()
        assert kept.tolist() == [1.5 if mode == "weight" else 2.0] * 4


def test_sample_takes_the_other_kind_where_its_own_is_missing():
    b = 6
    full, none = [[(i + 1) % b] for i in range(b)], [[-1]] * b
    own = torch.arange(b)
    pairs = batch(found(full, none), "sample")
    assert torch.equal(pairs.image_index[b:], own) and torch.equal(pairs.text_index[b:], (own + 1) % b)
    assert pairs.weights.tolist() == [1.0] * 2 * b
    pairs = batch(found(none, full), "sample")
    assert torch.equal(pairs.text_index[b:], own) and pairs.weights.tolist() == [1.0] * 2 * b
    # one anchor has none at all: the two kinds keep their shares
    negatives = found([[-1], *full[1:]], [[-1], *full[1:]])
    pairs = batch(negatives, "sample")
    gone = pairs.weights == 0
    assert gone.nonzero().tolist() == [[b]] and table(pairs)[b] == (0, 0, 1, 0.0)
    to_image = (pairs.text_index[b:] == own)[1:]
    of_image, of_text = pairs.weights[b + 1 :][to_image], pairs.weights[b + 1 :][~to_image]
    for part in (of_image, of_text):
        torch.testing.assert_close(part.sum(), torch.tensor(3.0))


@pytest.mark.parametrize("mode", MODES)
def test_no_negative_at_all_is_a_step_without_matching(mode):
    x = torch.randn(1, 4)
    alone = hard_negatives(x, x, 2, seed=0, step=0)
    twins = hard_negatives(x.repeat(3, 1), x.repeat(3, 1), seed=0, step=0, image_ids=torch.zeros(3, dtype=torch.int64))
    for negatives, m in ((alone, 1), (twins, 3)):
        with pytest.warns(UserWarning, match=NONE):
            pairs = batch(negatives, mode)
        assert not pairs.weights.any() and pairs.labels.all()
        assert int(pairs.image_index.max()) < m and int(pairs.text_index.max()) < m
        logits = torch.randn(len(pairs.labels), 2, requires_grad=True)
        loss = itm_loss(logits, pairs.labels, pairs.weights)
        assert loss.item() == 0.0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_beside_a_queue_has_negatives(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = batch(found([[4]], [[-1]]), mode)  # slot 3 of the queue of texts
    assert int(pairs.text_index.max()) == 4 and pairs.weights.mean().item() == 1.0
    assert table(pairs)[-1][:3] == (0, 4, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 3), (2, 0)])
def test_empty_batches(mode, m, n):
    x, y, labels = torch.randn(m, 4), torch.randn(n, 4), torch.full((m,), -1)
    negatives = hard_negatives(x, y, 2, seed=0, step=0, labels=labels)
    pairs = batch(negatives, mode, labels=labels)
    assert all(t.shape == (0,) for t in pairs)
    assert itm_loss(torch.zeros(0, 2), pairs.labels, pairs.weights).item() == 0.0


def test_indices_into_a_queue_stay_as_they_are():
    b, slots = 6, 20
    x, y = (F.normalize(torch.randn(b, 8, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    queue = FeatureQueue(slots, 8)
    queue.push(F.normalize(torch.randn(slots, 8, generator=torch.Generator().manual_seed(2)), dim=1))
    negatives = hard_negatives(x, y, 4, hardness=torch.inf, queue=queue)
    pairs = batch(negatives, "weight")
    assert int(pairs.text_index.max()) >= b and int(pairs.image_index.max()) < b
    texts = torch.cat([y, queue.features])[pairs.text_index]
    score = (x[pairs.image_index] * texts).sum(1)[-b * 4 :] / 0.07
    torch.testing.assert_close(score, negatives.text_score.flatten())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_anchors_are_the_images_with_a_text(mode, k):
    labels = torch.tensor([2, -1, 0, 2, -1])
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    negatives = hard_negatives(x, y, k, labels=labels, seed=0, step=0)
    pairs = batch(negatives, mode, labels=labels)
    assert len(pairs.labels) == 5 + 5 * k * (1 if mode == "sample" else 2)
    assert pairs.text_index[:5].tolist() == [2, 0, 0, 2, 0] and pairs.image_index[:5].tolist() == [0, 1, 2, 3, 4]
    live = pairs.weights > 0
    assert live[:5].tolist() == [True, False, True, True, False]
    torch.testing.assert_close(pairs.weights.mean(), torch.tensor(1.0))
    share = 0.5 if mode != "albef" else 1 / (1 + 2 * k)
    torch.testing.assert_close(pairs.weights[:5].sum() / len(live), torch.tensor(share))
    known = {(i, int(j)) for i, j in enumerate(labels)}
    for i, j, label, weight in table(pairs):
        assert not weight or ((i, j) in known) == bool(label)
        assert not weight or label or j in negatives.text_index[i] or i in negatives.image_index[j]


def test_the_negatives_of_a_loss_serve_too():
    from fastvlm_loss import clip_loss

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    beside = BatchNegatives(2, seed=1, step=0)
    clip_loss(x, y, 2.0, negatives=beside)
    want = batch(hard_negatives(x, y, 2, seed=1, step=0), "sample")
    assert table(batch(beside.found, "sample")) == table(want)


@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_in_one_graph(mode):
    torch.compiler.reset()
    draw = {"seed": 3, "step": 5} if mode == "sample" else {}
    labels = torch.tensor([1, -1, 0, 2])
    compiled = torch.compile(
        lambda negatives, labels: itm_batch(negatives, mode=mode, labels=labels, **draw), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (None, labels):
            assert table(compiled(others(4, 2), given)) == table(batch(others(4, 2), mode, labels=given))
        none = found([[-1, -1]] * 4, [[-1, -1]] * 4)
        assert table(compiled(none, None)) == table(batch(none, mode))


def test_inductor_draws_the_same_order():
    torch.compiler.reset()
    compiled = torch.compile(itm_batch, fullgraph=True)
    got, want = (f(others(50), seed=2**63 - 1, step=2**40 + 3) for f in (compiled, itm_batch))
    assert table(got) == table(want)


def test_nothing_of_it_reads_values():
    """On meta tensors there are none, as there are none to wait for on a GPU."""
    given = {name: value.to("meta") for name, value in vars(others(4, 2)).items() if value is not None}
    for mode in MODES:
        pairs = batch(HardNegatives(**given), mode)
        assert [t.shape[0] for t in pairs] == [12 if mode == "sample" else 20] * 4


def test_the_examples_of_the_page_run_in_order():
    blocks, scope = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), {}
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "itm.md", "exec"), scope)
    assert scope["loss"].isfinite() and scope["relevance"].grad.any() and scope["chosen"].shape == (16, 3, 4)


FOUR, UNEQUAL, BESIDE = others(4), found([[1]] * 2, [[0]] * 3), BatchNegatives(seed=1, step=1)
ERRORS = [
    (TypeError, "negatives: got BatchNegatives, wanted Hard", lambda: itm_batch(BESIDE)),
    (ValueError, "mode: got 'both', wanted one of", lambda: itm_batch(FOUR, mode="both")),
    (ValueError, "seed: got None beside mode='sample'", lambda: itm_batch(FOUR)),
    (ValueError, "step: got None beside mode='sample'", lambda: itm_batch(FOUR, seed=1)),
    (ValueError, "seed: got -1, wanted at least 0", lambda: itm_batch(FOUR, seed=-1, step=0)),
    (ValueError, r"step: got 9223372036854775808, wanted less", lambda: itm_batch(FOUR, seed=1, step=2**63)),
    (TypeError, "step: got float 0.5, wanted an int", lambda: itm_batch(FOUR, seed=1, step=0.5)),
    (ValueError, "step: got a float32 tensor", lambda: itm_batch(FOUR, seed=1, step=torch.ones(()))),
    (TypeError, "composition: got 0.5, wanted three shares", lambda: itm_batch(FOUR, 0.5, "weight")),
    (ValueError, r"composition: got \(0.5, 0.5, 0.1\), wanted", lambda: itm_batch(FOUR, (0.5, 0.5, 0.1), "weight")),
    (ValueError, "composition: .* both positives and negatives", lambda: itm_batch(FOUR, (1, 0, 0), "weight")),
    (ValueError, "composition: got -0.5", lambda: itm_batch(FOUR, (1, -0.5, 0.5), "weight")),
    (ValueError, "composition: .* beside mode='albef'", lambda: itm_batch(FOUR, (0.4, 0.3, 0.3), "albef")),
    (ValueError, "labels: got None for 2 image and 3 text", lambda: itm_batch(UNEQUAL, mode="weight")),
    (ValueError, "labels: got 4 at index 3", lambda: itm_batch(FOUR, mode="weight", labels=torch.arange(1, 5))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[c[1][:40] for c in ERRORS])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_who_is_out_of_the_batch_is_no_positive():
    a = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    b = a.clone()
    b[4] = float("nan")
    found = hard_negatives(a, b, seed=0, step=0, image_ids=torch.tensor([0, 1, -1, 3, 4]))
    batch = itm_batch(found, mode="weight")
    assert batch.weights[:5].tolist() == [pytest.approx(1.5 * 5 / 3)] * 2 + [0.0, pytest.approx(1.5 * 5 / 3), 0.0]
    assert float(batch.weights[batch.labels == 1].sum()) == pytest.approx(float(batch.weights[batch.labels == 0].sum()))
