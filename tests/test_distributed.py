"""Losses of a group of processes: the loss and all gradients are those of one process with the whole batch (gloo)."""

import math
import random
import socket

import group_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvlm_loss import (
    BatchMetrics,
    BatchNegatives,
    clip_loss,
    distributed,
    filters,
    hard_negatives,
    late_interaction_loss,
    linear_cross_entropy,
    margin_clip_loss,
    triplet_loss,
    vqa_loss,
)
from fastvlm_loss.losses import _margin
from fastvlm_loss.losses._spec import documented

MOST_FIELDS = 8  # numbers of a row's or column's state; features have 10 or more

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def run(world, job):
    """What each of `world` processes returns; a process that fails fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(group_cases.main, (world, port, job, results), nprocs=world, start_method="fork")
        return [results[rank] for rank in range(world)]


def every_case(rank, world):
    """All losses and sizes in fp64, and a rounding dtype with one size."""
    group, wrong = dist.group.WORLD, []
    for case in group_cases.CASES:
        for sizes in group_cases.SIZES.values():
            wrong += group_cases.compare(case, sizes[:world], torch.float64, group, rank, 1e-9)
        wrong += group_cases.compare(case, group_cases.SIZES["uneven"][:world], torch.float32, group, rank, 2e-5)
    return wrong


def every_case_in_a_ring(rank, world):
    """The same with shards that travel."""
    distributed.set_gather_limit(0)
    return every_case(rank, world)


def random_shapes(rank, world):
    """Two hundred random losses, shares and ways."""
    wrong = []
    for seed in range(200):
        chosen = random.Random(seed)
        sizes = tuple(chosen.randrange(10) for _ in range(world))
        case = chosen.choice(list(group_cases.CASES))
        distributed.set_gather_limit(chosen.choice([0, 2**32]))
        if sum(sizes) > 1:
            wrong += group_cases.compare(case, sizes, torch.float64, dist.group.WORLD, rank, 1e-8)
    return wrong


def in_subgroups(rank, world):
    """Two groups of two, the second of ranks that do not begin at 0."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    wrong = []
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        for case in ("clip ids", "clip labels", "siglip", "triplet, hardest", "soft target, learned teacher"):
            for group in (groups[rank // 2], mesh["shard"]):
                wrong += group_cases.compare(case, (4, 3), torch.float64, _process_group(group), rank % 2, 1e-9)
    x = torch.eye(4)
    loss = clip_loss(x, x, 5.0, group=mesh["shard"])
    assert torch.allclose(loss, clip_loss(torch.cat([x, x]), torch.cat([x, x]), 5.0))
    return wrong


def _process_group(group):
    return group.get_group() if hasattr(group, "get_group") else group


def picked(rank, world):
    """Negatives, metrics and per-sample losses."""
    sizes, group = group_cases.SIZES["uneven"][:world], dist.group.WORLD
    batch = group_cases.whole_batch(sum(sizes), torch.float32)
    mine, first = group_cases.own(batch, sizes, rank), sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    law, both = {"seed": 1, "step": 2}, ("image_features", "text_features")
    for takes, options in (
        ((), {}), ((), {"hardness": math.inf}), ((), {"floor": 1e-2}), (("image_ids",), {}), (("labels",), {}),
        ((), {"filters": filters.relative(0.5)}),
    ):  # fmt: skip
        want = hard_negatives(*(batch[k] for k in both), 3, **law, **{k: batch[k] for k in takes}, **options)
        ours = {k: mine[k] for k in takes}
        got = hard_negatives(*(mine[k] for k in both), 3, **law, **ours, **options, group=group)
        for name in ("text_index", "text_valid", "image_index", "image_valid", "image_in", "text_in"):
            assert torch.equal(getattr(got, name), getattr(want, name)[own]), (name, takes, options)
        if "floor" not in options:
            rule = {k: v for k, v in options.items() if k == "filters"}
            beside = BatchNegatives(3, **law, hardness=options.get("hardness", 1.0))
            clip_loss(*(mine[k] for k in both), 9.0, **ours, **rule, negatives=beside, group=group)
            assert torch.equal(beside.found.text_index, got.text_index)
            assert torch.equal(beside.found.image_index, got.image_index)
    for loss, pair in ((clip_loss, both), (late_interaction_loss, ("image_tokens", "text_tokens"))):
        told, whole = BatchMetrics(), BatchMetrics()
        loss(*(mine[k] for k in pair), 9.0, metrics=told, group=group)
        loss(*(batch[k] for k in pair), 9.0, metrics=whole)
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(told, name), value, atol=1e-5, rtol=1e-5)
    x, every = mine["image_features"].clone().requires_grad_(), batch["image_features"].clone().requires_grad_()
    losses = clip_loss(x, mine["text_features"], 9.0, reduction="none", group=group)
    wanted = clip_loss(every, batch["text_features"], 9.0, reduction="none")
    torch.testing.assert_close(losses, wanted[own])
    weight = torch.arange(float(sum(sizes)))
    (losses * weight[own]).sum().backward()
    (wanted * weight).sum().div(world).backward()  # the mean over the processes of what each makes of its own
    torch.testing.assert_close(x.grad / world, every.grad[own], atol=1e-5, rtol=1e-4)
    return []


def picked_in_a_ring(rank, world):
    """The same with shards that travel."""
    distributed.set_gather_limit(0)
    return picked(rank, world)


def vocabulary(rank, world):
    """Token losses: the mean is over the tokens of all processes."""
    sizes, group = (7, 2, 5, 1)[:world], dist.group.WORLD
    g = torch.Generator().manual_seed(3)
    n, first = sum(sizes), sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    hidden, weight = (torch.randn(k, 8, generator=g, dtype=torch.float64) for k in (n, 11))
    targets, shares = torch.randint(11, (n,), generator=g), torch.rand(n, generator=g).double()
    targets[0] = -100
    cases = {
        "mean": lambda h, w, t, s, group: linear_cross_entropy(h, w, t, token_weights=s, group=group),
        "sum": lambda h, w, t, s, group: linear_cross_entropy(h, w, t, token_weights=s, reduction="sum", group=group),
        "answers": lambda h, w, t, s, group: vqa_loss(
            h[:, None], w, t[:, None], s, len(h), shift=False, group=group
        ),
    }  # fmt: skip
    for name, loss in cases.items():
        one = [t.clone().requires_grad_() for t in (hidden, weight, shares)]
        part = [t.clone().requires_grad_() for t in (hidden[own], weight, shares[own])]
        want, got = loss(*one[:2], targets, one[2], None), loss(*part[:2], targets[own], part[2], group)
        torch.testing.assert_close(got, want, msg=name)
        want.backward()
        got.backward()
        dist.all_reduce(part[1].grad)
        for t, whole in zip(part, (one[0].grad[own], one[1].grad, one[2].grad[own]), strict=True):
            torch.testing.assert_close(t.grad / world, whole, atol=1e-9, rtol=1e-9)
    return []


def volume(rank, world):
    """Bytes that a process gets from the others are those of docs/distributed.md."""
    n, d, got = 6, 32, {}

    def counted(name, call):
        def counting(output, given, group=None):
            large = given if name == "reduce_scatter" else output
            got[name] = got.get(name, 0) + large.numel() * large.element_size() * (world - 1) // world
            return call(output, given, group=group)

        return counting

    for name in ("_all_gather", "_reduce_scatter"):
        setattr(distributed, name, counted(name[1:], getattr(distributed, name)))
    passed = distributed.Group.pass_on

    def passing(group, tensors):
        got["ring"] = got.get("ring", 0) + sum(t.numel() * t.element_size() for t in tensors)
        return passed(group, tensors)

    distributed.Group.pass_on = passing
    exchange = dist.all_to_all_single
    dist.all_to_all_single = counted("all_to_all", exchange)
    try:
        x, y = (group_cases.unit(n, d, seed, torch.bfloat16).requires_grad_() for seed in (rank, 10 + rank))
        loss = clip_loss(x, y, 9.0, group=dist.group.WORLD)
        others, states = n * (world - 1), 3 * 4
        agreement = 4 * 8 * (world - 1)
        assert got == {
            "all_gather": agreement + others * (2 * d + 2 * states), "all_to_all": others * states
        }, got  # fmt: skip
        loss.backward()
        assert got["reduce_scatter"] == others * 2 * d
        frozen = y.detach()
        got.clear()
        clip_loss(x, frozen, 9.0, group=dist.group.WORLD).backward()
        assert "reduce_scatter" not in got
        got.clear()
        distributed.set_gather_limit(0)
        loss = clip_loss(x, y, 9.0, group=dist.group.WORLD)
        assert got["ring"] == others * 2 * d and got["all_gather"] == agreement + others * 2 * states, got
        loss.backward()
        assert got["ring"] == 2 * others * 2 * d + n * world * d * 4 and "reduce_scatter" not in got, got
    finally:
        dist.all_to_all_single = exchange
    return []


def little_gathered(rank, world):
    """In a ring no loss gathers features: what a process collects of a sample, or adds up, is a few numbers."""
    widest, group = dict.fromkeys(group_cases.CASES, 0), dist.group.WORLD
    collect, scatter = distributed.Group.collect, distributed.Group.scatter

    def collecting(self, own, sizes):
        if sum(sizes) > _margin.SAMPLE:  # a margin's threshold is that of so many texts
            widest[case] = max(widest[case], *own.shape[1:], 0)
        return collect(self, own, sizes)

    def scattering(self, partial, sizes):
        raise AssertionError(f"{case}: {list(partial.shape)} scattered")

    distributed.set_gather_limit(0)
    distributed.Group.collect, distributed.Group.scatter = collecting, scattering
    _margin.SAMPLE = 2
    try:
        batch = group_cases.own(group_cases.whole_batch(4 * world, torch.float32), (4,) * world, rank)
        for case in group_cases.CASES:
            group_cases.evaluate(case, batch, group)
    finally:
        distributed.Group.collect, distributed.Group.scatter = collect, scatter
    assert widest["clip"] and not (large := {case: width for case, width in widest.items() if width > MOST_FIELDS}), (
        large
    )
    return []


def no_second_derivative(rank, world):
    """Of mined triplets, whose gradient of the scores is a constant: refused, gathered and in a ring, not wrong."""
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        x, y = (group_cases.unit(4, 8, seed, torch.float64).requires_grad_() for seed in (rank, 10 + rank))
        loss = triplet_loss(x, y, mining="max", group=dist.group.WORLD)
        found = torch.autograd.grad(loss, (x, y), create_graph=True)
        with pytest.raises(RuntimeError):
            sum(g.square().sum() for g in found).backward()
        dist.barrier()
    return []


def padding_reaches_nothing(rank, world):
    """A sample that takes no part may hold anything: gradients are the same gathered and in a ring."""
    batch = group_cases.own(group_cases.whole_batch(4 * world, torch.float64), (4,) * world, rank)
    ids, found = torch.arange(4) + 4 * rank, []
    ids[-1] = -1
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        x, y = (batch[k].clone() for k in ("image_features", "text_features"))
        x[-1], y[-1] = torch.nan, torch.nan
        x, y = x.requires_grad_(), y.requires_grad_()
        loss = triplet_loss(x, y, mining="max", image_ids=ids, group=dist.group.WORLD)
        found.append((loss, *torch.autograd.grad(loss, (x, y))))
        assert all(g[:-1].isfinite().all() for g in found[-1][1:])
    for gathered, travelled in zip(*found, strict=True):
        torch.testing.assert_close(travelled, gathered, equal_nan=True)
    return []


def nothing_at_all(rank, world):
    """A group without a sample has a loss of 0, as a process alone."""
    empty = torch.zeros(0, 4, requires_grad=True)
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        for loss in (
            clip_loss(empty, empty, 1.0, group=dist.group.WORLD),
            triplet_loss(empty, empty, group=dist.group.WORLD),
        ):
            assert loss.item() == 0
            loss.backward()
    return []


def refusals(rank, world):
    """What does not fit together is one error in every process, and nobody hangs."""
    x, group = torch.eye(4), dist.group.WORLD
    for ours, message in (
        (
            lambda: clip_loss(x[:, : 4 - rank], x[:, : 4 - rank], 1.0, group=group),
            "group: got processes with D = [4, 3",
        ),
        (lambda: clip_loss(x, x, 1.0, **({"image_ids": torch.arange(4)} if rank else {}), group=group), "options that"),
        (lambda: clip_loss(x, x[: 4 - rank], 1.0, group=group), "labels: got None"),
        (lambda: clip_loss(x, x, 1.0, normalize=rank == 0, group=group), "options that differ"),
        (lambda: clip_loss(x, x, 1.0, metrics=None if rank else BatchMetrics(), group=group), "options that differ"),
        (
            lambda: late_interaction_loss(x[:, None], x[:, None].repeat(1, 1 + rank, 1), 1.0, group=group),
            "options that differ",
        ),
        (
            lambda: margin_clip_loss(x, x, 1.0, text_embeddings=x, threshold=None if rank else 0.3, group=group),
            "options that differ",
        ),
    ):
        try:
            ours()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    dist.barrier()  # everybody is still there
    return []


def test_every_registered_loss_is_among_the_cases():
    without = {"linear_cross_entropy", "caption_loss", "vqa_loss"}  # whose tokens do not meet: `vocabulary`
    assert {case[0] for case in group_cases.CASES.values()} == documented.keys() - without


@pytest.mark.parametrize("job", [every_case, every_case_in_a_ring], ids=["gather", "ring"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_loss_is_that_of_the_whole_batch(world, job):
    wrong = [line for lines in run(world, job) for line in lines]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(("world", "job"), [(4, in_subgroups), (3, random_shapes)], ids=["subgroups", "random shapes"])
def test_subgroups_dimensions_of_a_mesh_and_random_shapes(world, job):
    wrong = [line for lines in run(world, job) for line in lines]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(
    "job",
    [
        picked,
        picked_in_a_ring,
        vocabulary,
        volume,
        little_gathered,
        no_second_derivative,
        padding_reaches_nothing,
        nothing_at_all,
        refusals,
    ],
    ids=lambda job: job.__name__,
)
def test_besides_the_losses(job):
    run(3, job)
