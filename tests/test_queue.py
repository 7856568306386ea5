"""FeatureQueue: first in, first out for any batch; its entries are negatives and nothing else."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import FeatureQueue, clip_loss, siglip_loss, triplet_loss
from fastvlm_loss.engine import ops
from fastvlm_loss.scores.appended import learned_rows


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


def numbered(first, count):
    return torch.arange(first, first + count).float()[:, None].expand(count, 3)


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 12, 40])
def test_the_last_ones_stay_whatever_the_batch(batch):
    queue = FeatureQueue(12, 3)
    for k in range(0, 36, batch):
        queue.push(numbered(k, batch), torch.arange(k, k + batch), step=k)
        last = torch.arange(k + batch)[-12:]
        filled = queue.ids >= 0
        assert len(queue) == len(last) == filled.sum()
        assert torch.equal(queue.ids[filled].sort().values, last)
        assert torch.equal(queue.features[filled][:, 0].long(), queue.ids[filled])


def extended(queue, x, y, ids=None):
    """The image direction of clip_loss with the queue's texts."""
    texts, text_ids = queue.extend(y, ids)
    own = text_ids[: len(y)]
    return clip_loss(x, texts, 10.0, labels=torch.arange(len(x)), image_ids=own, text_ids=text_ids, directions="image")


def test_an_empty_queue_changes_nothing(pair):
    x, y = pair(10)
    torch.testing.assert_close(extended(FeatureQueue(8, 32), x, y), clip_loss(x, y, 10.0, directions="image"))


def test_its_entries_are_further_columns_without_gradient(pair):
    x, y = pair(10)
    past = pair(6, seed=4)[1]
    queue = FeatureQueue(8, 32)
    queue.push(past)
    loss = extended(queue, x, y)
    s = 10.0 * x @ torch.cat([y, past.detach()]).T
    want = F.cross_entropy(s, torch.arange(10))
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not queue.features.requires_grad


def test_the_other_direction_has_further_rows(pair):
    x, y = pair(10)
    past = pair(6, seed=4)[0]
    queue = FeatureQueue(8, 32)
    queue.push(past)
    images, ids = queue.extend(x)
    loss = clip_loss(images, y, 10.0, labels=queue.labels(10), image_ids=ids, text_ids=ids[:10], directions="text")
    s = 10.0 * y @ torch.cat([x, past.detach()]).T
    torch.testing.assert_close(loss, F.cross_entropy(s, torch.arange(10)))


def of_texts(loss, x, y, queue, scale, **options):
    texts, ids = queue.extend(y)
    return loss(x, texts, scale, labels=torch.arange(len(x)), image_ids=ids[: len(x)], text_ids=ids, **options)


def of_images(loss, x, y, queue, scale, **options):
    images, ids = queue.extend(x)
    return loss(images, y, scale, labels=queue.labels(len(x)), image_ids=ids, text_ids=ids[: len(y)], **options)


def ranked(x, y, scale, **options):
    return scale * triplet_loss(x, y, **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("loss", "options"), [
    (clip_loss, {"directions": "image"}), (clip_loss, {"label_smoothing": 0.1}), (clip_loss, {"normalize": True}),
    (siglip_loss, {}), (ranked, {}),
])  # fmt: skip
@pytest.mark.parametrize(("extend", "last"), [(of_texts, 1), (of_images, 0)])
def test_the_gradient_of_its_entries_is_not_made(
    pair, live_backend, monkeypatch, loss, options, extend, last, autocast
):
    x, y = pair(10)
    queue, scale = FeatureQueue(30, 32), torch.tensor(4.0, requires_grad=True)
    queue.push(pair(30, seed=4)[last])
    if options.get("directions"):
        options = {"directions": ("text", "image")[last]}
    shapes = []
    for made in (ops.GRADIENT, ops.SWEEP):

        def asked(*arguments, real=made[live_backend], sweep=made is ops.SWEEP):
            found = real(*arguments)
            shapes.append([t.shape for t in found[sweep:][:2]])
            return found

        monkeypatch.setitem(made, live_backend, asked)
    found = []
    for name in (live_backend, "dense"):
        with fastvlm_loss.backend(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = extend(loss, x, y, queue, scale, **options)
        found.append(torch.autograd.grad(value, (x, y, scale)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-4, atol=2e-3 if autocast else 1e-6)
    assert shapes == [[(10, 32), (10, 32)]]


def test_what_is_made_of_extended_features_has_a_gradient_of_its_own(pair):
    y = pair(10)[1]
    texts, _ = FeatureQueue(8, 32).extend(y)
    assert learned_rows(texts) == 10
    other = 2 * texts
    assert learned_rows(other) == learned_rows(other[:18]) == 18
    with torch.no_grad():
        assert learned_rows(FeatureQueue(8, 32).extend(y)[0]) == 18
    texts[0] = 1.0
    assert learned_rows(texts) == 18


def test_an_entry_with_the_anchors_id_is_no_negative(pair):
    x, y = pair(10)
    queue = FeatureQueue(8, 32)
    queue.push(y[:4].detach(), torch.arange(4))
    loss = extended(queue, x, y, torch.arange(10))
    s = 10.0 * x @ torch.cat([y, y[:4]]).T
    out = F.pad(torch.eye(10, 4, dtype=torch.bool), (10, 0))
    torch.testing.assert_close(loss, F.cross_entropy(s.masked_fill(out, -torch.inf), torch.arange(10)))


def test_old_entries_are_no_candidates():
    queue = FeatureQueue(6, 3, max_age=2)
    for step in range(3):
        queue.push(numbered(2 * step, 2), torch.arange(2 * step, 2 * step + 2), step=step)
    assert queue.valid_ids(step=3).tolist() == [-1, -1, 2, 3, 4, 5]
    assert queue.valid_ids().tolist() == [0, 1, 2, 3, 4, 5]
    _, ids = queue.extend(numbered(0, 1), torch.tensor([9]), step=4)
    assert ids.tolist() == [9, -1, -1, -1, -1, 4, 5]


def test_it_survives_a_checkpoint():
    queue, other = FeatureQueue(5, 3), FeatureQueue(5, 3)
    queue.push(numbered(0, 4))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.push(numbered(9, 3))
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert len(queue.ids.unique()) == 5  # without ids nobody equals anybody


def test_it_compiles():
    queue = FeatureQueue(6, 3)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        queue.push(x)
        return queue.extend(x)

    features, ids = step(numbered(1, 4))
    assert features.shape == (10, 3) and (ids == -1).sum() == 2


def test_errors():
    queue = FeatureQueue(4, 3)
    for kind, message, call in (
        (ValueError, r"features: got \[2, 5\], wanted \[B, 3\]", lambda: queue.push(torch.ones(2, 5))),
        (ValueError, r"ids: got .*\[3\], wanted shape \[2\]", lambda: queue.push(torch.ones(2, 3), torch.arange(3))),
        (ValueError, "size: got 0", lambda: FeatureQueue(0, 3)),
        (TypeError, "dim: got float", lambda: FeatureQueue(3, 3.0)),
        (TypeError, "dtype: got torch.int64", lambda: FeatureQueue(3, 3, dtype=torch.int64)),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_a_payload_travels_with_its_features():
    queue = FeatureQueue(4, 2, payload=((3,), torch.int64))
    tokens = torch.arange(18).reshape(6, 3)
    queue.push(torch.eye(2).repeat(3, 1), torch.arange(6), payload=tokens)
    assert queue.payload.tolist() == [tokens[4].tolist(), tokens[5].tolist(), tokens[2].tolist(), tokens[3].tolist()]
    batch = torch.full((5, 3), -7)
    batch[1] = 99
    found = queue.gather(batch, torch.tensor([[1, 5], [8, -1]]))
    assert found.tolist() == [[[99] * 3, tokens[4].tolist()], [tokens[3].tolist(), [-7] * 3]]
    other = FeatureQueue(4, 2, payload=((3,), torch.int64))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.payload, queue.payload)


def test_gathered_values_keep_their_gradient():
    queue = FeatureQueue(2, 2, payload=((2,), torch.float32))
    values = torch.ones(3, 2, requires_grad=True)
    queue.gather(values, torch.tensor([0, 2, 4])).sum().backward()
    assert values.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_nothing_is_a_candidate_before_the_start():
    queue = FeatureQueue(3, 2, start_step=10)
    queue.push(torch.eye(2), torch.tensor([4, 5]), step=2)
    assert queue.valid_ids(9).tolist() == [-1, -1, -1] and queue.valid_ids(10).tolist() == [4, 5, -1]
    assert queue.valid_ids(torch.tensor(9)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q, p: q.push(torch.eye(2), payload=torch.ones(2, 3)), "payload: got a tensor, wanted None"),
        (lambda q, p: p.push(torch.eye(2)), "payload: got None, wanted torch.int64"),
        (lambda q, p: p.push(torch.eye(2), payload=torch.ones(2, 3)), "payload: got torch.float32"),
        (lambda q, p: q.gather(torch.ones(2, 3), torch.tensor([0])), "gather: the queue was made without"),
        (lambda q, p: p.gather(torch.ones(2, 4), torch.tensor([0])), "values: got torch.float32"),
        (lambda q, p: FeatureQueue(2, 2, payload=3), "payload: got 3"),
        (lambda q, p: FeatureQueue(2, 2, payload=(3, torch.int64)), "payload: got \\(3, torch.int64\\)"),
        (lambda q, p: FeatureQueue(2, 2, payload=((3,), "int")), "payload: got"),
        (lambda q, p: p.gather(torch.ones(0, 3, dtype=torch.int64), torch.tensor([0])), "values: got a batch of 0"),
        (lambda q, p: FeatureQueue(2, 2, start_step=-1), "start_step: got -1"),
    ],
)
def test_errors_of_payloads_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(FeatureQueue(4, 2), FeatureQueue(4, 2, payload=((3,), torch.int64)))


def test_what_two_queues_append_has_no_gradient_either():
    first, second = FeatureQueue(5, 4), FeatureQueue(3, 4)
    own = torch.randn(6, 4, requires_grad=True)
    features, _ = second.extend(*first.extend(own))
    assert features.shape == (14, 4) and learned_rows(features) == 6
