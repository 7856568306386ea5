"""Queues, hard negatives beside them and image-text matching of a group: as of one process with the whole batch."""

import math

import pytest
import torch
import torch.distributed as dist
from group_cases import SIZES, unit
from test_distributed import run

from fastvlm_loss import (
    FeatureQueue,
    clip_loss,
    distributed,
    filters,
    hard_negatives,
    itm_batch,
    itm_loss,
    multiscale_itm_loss,
    triplet_loss,
)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
D = 12


def share(rank, world, kind):
    """Which samples are this process's own, and their number in all."""
    sizes = SIZES[kind][:world]
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank]), sum(sizes)


def filled(size, own, total, group, seed, **options):
    """A queue after two pushes, of a group's process its own part."""
    queue = FeatureQueue(size, D, dtype=torch.float64, payload=((2,), torch.float64), **options)
    for step in range(2):
        past = unit(total, D, seed + step, torch.float64)
        ids = None if step else torch.arange(total) % 5
        part = [past, ids, torch.stack([past[:, 0], past[:, 1]], 1)]
        features, ids, payload = (t if t is None else t[own] for t in part)
        queue.push(features, ids, step, payload, group=group)
    return queue


def queues(rank, world):
    """Every process ends with the queue of one process, and losses with it are those of one process."""
    group = dist.group.WORLD
    for limit, kind, size in ((2**32, "uneven", 17), (0, "uneven", 9), (2**32, "with an empty one", 2)):
        distributed.set_gather_limit(limit)
        own, total = share(rank, world, kind)
        ours, one = filled(size, own, total, group, 20), filled(size, slice(None), total, None, 20)
        for (name, got), want in zip(ours.state_dict().items(), one.state_dict().values(), strict=True):
            assert torch.equal(got, want), (name, kind)
        batch = [unit(total, D, seed, torch.float64) for seed in (0, 1)]
        for side, ids in (("image", None), ("text", None), ("image", torch.arange(total) % 7)):
            whole = [t.clone().requires_grad_() for t in batch]
            mine = [t[own].clone().requires_grad_() for t in batch]
            want = with_queue(one, side, *whole, ids, None)
            got = with_queue(ours, side, *mine, ids if ids is None else ids[own], group)
            torch.testing.assert_close(got, want, msg=f"{kind}, {side}")
            got.backward()
            want.backward()
            for t, w in zip(mine, whole, strict=True):
                torch.testing.assert_close(t.grad / world, w.grad[own], atol=1e-10, rtol=1e-8)
    return []


def with_queue(queue, side, images, texts, ids, group):
    """The loss of one direction with the queue's features on the other side."""
    ids = queue.own_ids(len(images), group=group) if ids is None else ids
    if side == "image":
        texts, text_ids = queue.extend(texts, ids, group=group)
        given = {"labels": queue.places(len(ids), group=group), "image_ids": ids, "text_ids": text_ids}
    else:
        labels = queue.labels(len(images), group=group)
        images, image_ids = queue.extend(images, ids, group=group)
        given = {"labels": labels, "image_ids": image_ids, "text_ids": ids}
    loss = clip_loss(images, texts, 9.0, **given, directions=side, group=group)
    return loss + triplet_loss(images, texts, **given, directions=side, group=group)


def negatives(rank, world):
    """Negatives beside queues, the pairs made of them and their loss."""
    group = dist.group.WORLD
    for limit, kind in ((2**32, "uneven"), (0, "with an empty one")):
        distributed.set_gather_limit(limit)
        own, total = share(rank, world, kind)
        x, y = (unit(total, D, seed, torch.float32) for seed in (0, 1))
        ids = torch.arange(total) // 2
        ids[1] = -1
        of_images, of_texts = both = tuple(filled(11, own, total, group, seed, max_age=3) for seed in (20, 30))
        for queue, options in (
            (None, {}), (of_texts, {}), ((of_images, None), {"image_ids": ids}), (both, {"floor": 0.1}),
            (both, {"hardness": math.inf}), (both, {"filters": filters.relative(0.5)}),
        ):  # fmt: skip
            mine = options | ({"image_ids": ids[own]} if "image_ids" in options else {})
            law = {"k": 3, "seed": 1, "step": 2, "queue": queue}
            want = hard_negatives(x, y, **law, **options)
            got = hard_negatives(x[own], y[own], **law, **mine, group=group)
            for name in ("text_index", "text_valid", "image_index", "image_valid", "image_in", "text_in"):
                assert torch.equal(getattr(got, name), getattr(want, name)[own]), (name, options, kind)
            torch.testing.assert_close(got.text_score, want.text_score[own])
            if queue is None or "image_ids" in options:
                matching(got, want, total, own, world, group)
    return []


def matching(ours, one, total, own, world, group):
    """Pairs, weights, loss and gradients of what the fusion encoder sees."""
    features = unit(total, 4, 5, torch.float64), unit(total, 4, 6, torch.float64)
    for mode, labels, reduction in (
        ("sample", None, "mean"), ("weight", torch.arange(total).flip(0), "mean"), ("albef", None, "sum"),
    ):  # fmt: skip
        law = {"seed": 3, "step": 4} if mode == "sample" else {}
        want = itm_batch(one, mode=mode, labels=labels, **law)
        got = itm_batch(ours, mode=mode, labels=labels if labels is None else labels[own], group=group, **law)
        for mine, every in zip(got, want, strict=True):  # positives first, then blocks of 3 negatives an anchor
            wrong = every[total:].unflatten(0, (-1, total, 3))[:, own]
            assert torch.equal(mine, torch.cat([every[:total][own], wrong.flatten()])), mode
        whole = [t.clone().requires_grad_() for t in features]
        part = [t[own].clone().requires_grad_() for t in features]
        loss, expected = matched(*part, got, reduction, group), matched(*whole, want, reduction, None)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for t, w in zip(part, whole, strict=True):
            torch.testing.assert_close(t.grad / world, w.grad[own], atol=1e-9, rtol=1e-7)


def matched(images, texts, pairs, reduction, group):
    """Of a fusion encoder that multiplies, and of the patches' loss."""
    if group is not None:
        images, texts = (distributed.gathered(t, group) for t in (images, texts))
    image, text = (t[index % len(t)] for t, index in ((images, pairs.image_index), (texts, pairs.text_index)))
    logit = 3 * (image * text).sum(1)  # a slot of a queue is taken for one of the batch
    loss = itm_loss(torch.stack([-logit, logit], 1), pairs.labels, pairs.weights, reduction=reduction, group=group)
    pairs = pairs._replace(image_index=pairs.image_index % len(images), text_index=pairs.text_index % len(texts))
    return loss + multiscale_itm_loss(images[:, None], texts, pairs, reduction=reduction, group=group)


def both(rank, world):
    """One start of the processes for all."""
    return queues(rank, world) + negatives(rank, world)


def test_queues_negatives_and_matching_are_those_of_one_process():
    run(3, both)
