"""torch.compile around a loss of a group: encoders and what follows are graphs, loss and gradients are the same."""

import group_cases
import pytest
import torch
import torch.distributed as dist
from test_distributed import run

from fastvlm_loss import clip_loss, distributed, hard_negatives, siglip_loss, triplet_loss

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
LOSSES = {
    "clip": lambda x, y, a, ids, group: clip_loss(x, y, a.exp(), image_ids=ids, group=group),
    "siglip": lambda x, y, a, ids, group: siglip_loss(x, y, a.exp(), -2.0, image_ids=ids, group=group),
    "triplet": lambda x, y, a, ids, group: triplet_loss(a.exp() * x, y, mining="max", group=group),
}


def step_of(loss, group):
    """An encoder, a loss, and what is made of it."""

    def step(tower, scale, images, texts, ids):
        x, y = (torch.nn.functional.normalize(tower(t).tanh(), dim=1) for t in (images, texts))
        return loss(x, y, scale, ids, group) * 3 + 1

    return step


def same_as_one_process(rank, world, name, graphs):
    """The mean over the processes of a compiled step's gradients is the gradient of one process, uncompiled."""
    g = torch.Generator().manual_seed(0)
    tower, scale = torch.nn.Linear(6, 8).double(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    learned = [*tower.parameters(), scale]
    ours = torch.compile(step_of(LOSSES[name], dist.group.WORLD), backend=graphs)
    for sizes in ((5, 3), (2, 6)):  # the second time the graphs are there, and shares have other sizes
        images, texts = (torch.randn(sum(sizes), 6, generator=g, dtype=torch.float64) for _ in range(2))
        ids = torch.arange(sum(sizes)) // 2
        want = step_of(LOSSES[name], None)(tower, scale, images, texts, ids)
        got = ours(tower, scale, *(t.split(sizes)[rank] for t in (images, texts, ids)))
        torch.testing.assert_close(got, want, msg=name)
        for p, t in zip(torch.autograd.grad(got, learned), torch.autograd.grad(want, learned), strict=True):
            dist.all_reduce(p)
            torch.testing.assert_close(p / world, t, atol=1e-9, rtol=1e-7, msg=name)


def steps(rank, world):
    """Gathered and in a ring; a graph in one piece is refused with a reason."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.utils.counters.clear()
    for limit, name in ((2**32, "siglip"), (2**32, "triplet"), (0, "clip")):
        torch._dynamo.reset()
        distributed.set_gather_limit(limit)
        graphs = CompileCounterWithBackend("aot_eager")
        same_as_one_process(rank, world, name, graphs)
        assert graphs.op_count >= 8, "the encoder was not compiled"
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert any("a loss with group= is not compiled" in reason for reason in breaks), breaks
    assert all("torch.compiler.disable()" in reason for reason in breaks), breaks  # the first call makes the wrapper
    x = group_cases.unit(4, 8, rank, torch.float32)
    whole = torch.compile(lambda x: clip_loss(x, x, 5.0, group=dist.group.WORLD), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a loss with group= is not compiled"):
        whole(x)

    def picked(x):
        return hard_negatives(x + 0, x + 0, 2, seed=0, step=0, group=dist.group.WORLD).text_index * 2

    assert torch.equal(torch.compile(picked, backend="eager")(x), picked(x))
    return []


def test_compiled_steps_of_two_processes():
    run(2, steps)
