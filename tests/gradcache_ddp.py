"""Run by test_gradcache_ddp.py, once a rank: `gradcache_ddp.py RANK FOLDER`; writes what is wrong with each case."""

import copy
import datetime
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gradcache_cases import Tower, assert_near, batch, by_one_backward, gradients, make
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from fastvlm_loss import cached_step, clip_loss

WORLD = 2
ROWS = (11, 5)  # of the ranks: four micro-batches of 3 and two


class Counted(DistributedDataParallel):
    """Notes which bucket was reduced, and of how many parameters; small buckets, so that there are several."""

    def __init__(self, module, **options):
        super().__init__(module, bucket_cap_mb=3e-4, **options)
        self.reduced = []
        self.register_comm_hook(self.reduced, reduce)

    def take(self):
        """Whether every trainable parameter was reduced once, since the last call."""
        buckets = [index for index, _ in self.reduced]
        parameters = sum(count for _, count in self.reduced)
        self.reduced.clear()
        once = sorted(buckets) == list(range(len(buckets)))
        return once and parameters == sum(p.requires_grad for p in self.parameters())


def reduce(notes, bucket):
    notes.append((bucket.index(), len(bucket.parameters())))
    work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def mean_over_ranks(step):
    """Gradients of the mean over ranks, from a step (rank -> gradients) that needs no other rank."""
    found = [step(rank) for rank in range(WORLD)]
    return {name: sum(g[name] for g in found) / WORLD for name in found[0]}


def own(rank, seed=1):
    return batch(ROWS[rank], seed=seed + 10 * rank)


def expected(model, seed=1, rows=None):
    """Of plain steps on both ranks' batches."""
    return mean_over_ranks(lambda rank: by_one_backward(copy.deepcopy(model), *own(rank, seed))[1])


def two_modules(rank):
    model = make(3)
    want = mean_over_ranks(lambda r: plain(copy.deepcopy(model), *own(r)))
    image, text = Counted(model.image), Counted(model.text)
    for _ in range(3):  # buckets are rebuilt after the first
        cached_step(image, text, *own(rank), lambda x, y: clip_loss(x, y, 10.0), micro_batch=3)
        assert image.take() and text.take()
        assert_near(gradients(model), want)


def plain(model, images, texts):
    clip_loss(model.image(images), model.text(texts), 10.0).backward()
    return gradients(model)


def one_module(rank, **options):
    """Each encoder reaches a part of it, and logit_scale is reached by the loss alone."""
    model = make(3)
    want = expected(model)
    ddp = Counted(model, **options)
    for _ in range(3):
        cached_step(lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), model.loss, micro_batch=3)
        assert ddp.take()
        assert_near(gradients(model), want)


def a_loss_that_is_a_forward_of_the_module(rank):
    model = make(3)
    want = expected(model)
    ddp = Counted(model)
    for _ in range(2):
        cached_step(
            lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), lambda x, y: ddp(features=(x, y)), micro_batch=3
        )
        assert ddp.take()
        assert_near(gradients(model), want)


def one_module_that_looks_for_unused_parameters(rank):
    one_module(rank, find_unused_parameters=True)


def one_module_with_gradients_in_the_buckets(rank):
    one_module(rank, gradient_as_bucket_view=True)


def a_side_that_the_loss_ignores(rank):
    model = make(3)
    ddp = Counted(model, find_unused_parameters=True)
    loss = lambda x, y: x[:, 0].sum()  # noqa: E731

    def step(r):
        one = copy.deepcopy(model)
        loss(one.encode_image(own(r)[0]), None).backward()
        return gradients(one)

    want = mean_over_ranks(step)
    for _ in range(2):
        cached_step(lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), loss, micro_batch=3)
        assert ddp.take()
        got = gradients(model)
        assert not any(g.any() for name, g in got.items() if name not in want)
        assert_near({name: got[name] for name in want}, want)


def a_frozen_side(rank):
    model = make(3)
    model.text.requires_grad_(False)
    image = Counted(model.image)
    want = mean_over_ranks(lambda r: plain(copy.deepcopy(model), *own(r)))
    for _ in range(2):
        cached_step(image, model.text, *own(rank), lambda x, y: clip_loss(x, y, 10.0), micro_batch=3)
        assert image.take()
        assert_near(gradients(model), want)


class Branching(Tower):
    """Uses its last layer for full micro-batches of 3 only: not for the last one of either rank."""

    def forward(self, x):
        features = self.body[:4](x)
        return F.normalize(self.body[4](features) if len(x) == 3 else features[:, :8], dim=1)


def a_parameter_that_the_last_micro_batch_does_not_use(rank):
    torch.manual_seed(3)
    towers = [Branching(width) for width in (6, 5)]

    def step(r):
        image, text = (copy.deepcopy(tower) for tower in towers)
        x, y = (torch.cat([t(part) for part in side.split(3)]) for t, side in zip((image, text), own(r), strict=True))
        clip_loss(x, y, 10.0).backward()
        return gradients(image)

    want = mean_over_ranks(step)
    image, text = (Counted(tower) for tower in towers)
    for _ in range(2):
        cached_step(image, text, *own(rank), lambda x, y: clip_loss(x, y, 10.0), micro_batch=3)
        assert image.take() and text.take()
        assert_near(gradients(towers[0]), want)
        gradients(towers[1])


def accumulation(rank):
    model = make(3)
    want = {name: a + b for (name, a), b in zip(expected(model).items(), expected(model, 2).values(), strict=True)}
    ddp = Counted(model)
    encoders = (lambda x: ddp(image=x), lambda x: ddp(text=x))
    for _ in range(2):
        with ddp.no_sync():
            cached_step(*encoders, *own(rank), model.loss, micro_batch=3)
        assert not ddp.reduced
        cached_step(*encoders, *own(rank, 2), model.loss, micro_batch=3)
        assert ddp.take()
        assert_near(gradients(model), want)


def a_module_that_only_the_loss_calls(rank):
    model, head = make(3), nn.Linear(8, 8)
    dist.broadcast(head.weight.data, 0)
    ddp, reduced = Counted(model), Counted(head)
    for _ in range(2):
        cached_step(
            lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), lambda x, y: model.loss(reduced(x), y),
            micro_batch=3,
        )  # fmt: skip
        assert ddp.take() and reduced.take()
        gradients(model), gradients(head)


def unnamed_modules_reduce_every_micro_batch(rank):
    """What the others would see without no_sync(): the count is not blind."""
    model = make(3)
    image, text = Counted(model.image), Counted(model.text)
    images, texts = batch(11, seed=rank)
    for _ in range(2):
        image.reduced.clear()
        cached_step(image, text, images, texts, lambda x, y: clip_loss(x, y, 10.0), micro_batch=3, modules=())
    assert [index for index, _ in image.reduced].count(0) == 4 and not image.take()


def a_loss_over_the_group(rank):
    """Called once on every rank; the batch is that of both, in one process the same gradients."""
    model, calls = make(3), []
    shards = [batch(7, seed=1 + 10 * r) for r in range(WORLD)]
    images, texts = (torch.cat(side) for side in zip(*shards, strict=True))
    value, want = by_one_backward(copy.deepcopy(model), images, texts)
    ddp = Counted(model)

    def loss(x, y):
        calls.append(len(x))
        return model.loss(torch.cat(all_gather(x)), torch.cat(all_gather(y)))

    got = cached_step(lambda x: ddp(image=x), lambda x: ddp(text=x), *shards[rank], loss, micro_batch=3)
    assert calls == [7] and ddp.take()
    torch.testing.assert_close(got, value)
    assert_near(gradients(model), want)


def a_group_of_this_library(rank):
    """Ranks with other numbers of pairs and micro-batches; the mean over ranks is the loss of all."""
    model = make(3)
    images, texts = (torch.cat(side) for side in zip(*map(own, range(WORLD)), strict=True))
    value, want = by_one_backward(copy.deepcopy(model), images, texts)
    ddp = Counted(model)
    loss = lambda x, y: clip_loss(x, y, model.logit_scale.exp(), model.logit_bias, group=dist.group.WORLD)  # noqa: E731
    for _ in range(2):
        mean = cached_step(lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), loss, micro_batch=3) / WORLD
        dist.all_reduce(mean)
        assert ddp.take()
        torch.testing.assert_close(mean, value)
        assert_near(gradients(model), want)


def running_statistics(rank):
    """Rank 0's buffers are sent to the others once a step, whatever the number of micro-batches."""
    model = make(3, norm=nn.BatchNorm1d)
    one = copy.deepcopy(model)
    ddp = Counted(model)
    for _ in range(2):
        cached_step(lambda x: ddp(image=x), lambda x: ddp(text=x), *own(rank), model.loss, micro_batch=3)
        for encode, side in zip((one.encode_image, one.encode_text), own(rank), strict=True):
            for x in side.split(3):
                encode(x)
        assert ddp.take()
        if rank == 0:
            for (name, got), want in zip(model.named_buffers(), one.buffers(), strict=True):
                torch.testing.assert_close(got, want, msg=name)
        gradients(model)


def sharded_parameters(rank):
    """FSDP2 reduces every micro-batch, so there must be equally many."""
    from torch.distributed.fsdp import fully_shard

    model = make(3)
    shards = [batch(7, seed=1 + 10 * r) for r in range(WORLD)]
    want = mean_over_ranks(lambda r: plain(copy.deepcopy(model), *shards[r]))
    for tower in (model.image, model.text):
        fully_shard(tower.body[0])
        fully_shard(tower)
    for _ in range(2):
        cached_step(model.image, model.text, *shards[rank], lambda x, y: clip_loss(x, y, 10.0), micro_batch=3)
        assert_near({name: g.full_tensor() for name, g in gradients(model).items()}, want)


def errors(rank):
    model = make(3)
    ddp, static = Counted(model), DistributedDataParallel(copy.deepcopy(model), static_graph=True)
    module = ddp.module
    for message, encoder, modules in (
        ("whose forward no encoder called", lambda x: ddp.module.image(x), None),
        ("whose forward no encoder called", lambda x: module.image(x), [ddp]),
        ("got a DistributedDataParallel with static_graph=True", lambda x: static(image=x), None),
    ):
        try:
            cached_step(encoder, model.encode_text, *own(rank), model.loss, micro_batch=3, modules=modules)
        except ValueError as error:
            assert str(error).startswith("modules: got a DistributedDataParallel") and message in str(error)
        else:
            raise AssertionError(f"wanted an error: {message}")


class Fused(nn.Module):
    """A tower that is frozen, and what the loss itself calls and trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tower, self.fuse = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1)

    def forward(self, part, x):
        return self.tower(x) if part == "tower" else self.fuse(x)


def what_only_the_loss_trains_is_reduced_too(rank):
    x, model = torch.randn(6, 4, generator=torch.Generator().manual_seed(rank)), DistributedDataParallel(Fused())
    found = []
    for micro_batch in (None, 2):
        model.zero_grad()
        encode = lambda part: model("tower", part)  # noqa: E731
        cached_step(
            encode, encode, x, x, lambda a, b: model("fuse", a + b).square().mean(), micro_batch=micro_batch,
            modules=[model],
        )  # fmt: skip
        found.append(model.module.fuse.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])
    alike = [torch.empty_like(found[1]) for _ in range(WORLD)]
    dist.all_gather(alike, found[1])
    assert torch.equal(*alike), "the ranks part ways"


CASES = [
    what_only_the_loss_trains_is_reduced_too,
    two_modules, one_module, one_module_that_looks_for_unused_parameters, one_module_with_gradients_in_the_buckets,
    a_loss_that_is_a_forward_of_the_module, a_side_that_the_loss_ignores, a_frozen_side,
    a_parameter_that_the_last_micro_batch_does_not_use, accumulation, a_module_that_only_the_loss_calls,
    unnamed_modules_reduce_every_micro_batch, a_loss_over_the_group, a_group_of_this_library,
    running_statistics, sharded_parameters, errors,
]  # fmt: skip


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    wrong = {}
    for case in CASES:
        try:
            case(rank)
        except Exception:  # noqa: BLE001  # reported by the test
            wrong[case.__name__] = traceback.format_exc()
            break  # the other rank is elsewhere now
        wrong[case.__name__] = ""
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
