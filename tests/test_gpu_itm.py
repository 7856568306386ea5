"""Image-text matching on a GPU: the same numbers as on a CPU, the same bits from run to run, and nothing waits.

With FASTVLM_TEST_DEVICE=cpu it runs without one, all but the waiting.
"""

import os
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss import HardNegatives, MatchingHead, hard_negatives, itm_batch, itm_loss, multiscale_itm_loss
from fastvlm_loss.backends import pair_products as chunked

DEVICE = os.environ.get("FASTVLM_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
MODES = ["sample", "weight", "albef"]


@contextmanager
def nothing_waits():
    """A synchronisation is an error inside the block."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def negatives(b=40, k=2):
    x, y = (F.normalize(torch.randn(b, 16, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    return hard_negatives(x, y, k, seed=1, step=0, image_ids=torch.arange(b) // 2)


def batch(found, mode):
    return itm_batch(found, mode=mode, **({"seed": 2, "step": 9} if mode == "sample" else {}))


@pytest.mark.parametrize("mode", MODES)
def test_the_pairs_are_those_of_a_cpu(mode):
    found = negatives()
    there = HardNegatives(**{name: value.to(DEVICE) for name, value in vars(found).items()})
    batch(there, mode)  # whatever is loaded at first
    with nothing_waits():
        pairs = batch(there, mode)
    for got, want in zip(pairs, batch(found, mode), strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("chunk", [2**12, 2**24])
@pytest.mark.parametrize("mode", ["soft", "hard", "mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_are_those_of_a_cpu(mode, dtype, chunk, monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, DEVICE, chunk)
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(*s, generator=g), dim=-1).to(dtype) for s in ((40, 9, 16), (40, 16)))
    r, mask = 0.1 + 0.9 * torch.rand(40, 9, generator=g), torch.rand(40, 9, generator=g) < 0.7
    pairs, head = batch(negatives(), "weight"), MatchingHead(16, dtype=dtype)

    def run(device):
        module = head.to(device)
        tensors = [t.to(device).requires_grad_() for t in (x, y, r)]
        there, own_mask = type(pairs)(*(t.to(device) for t in pairs)), mask.to(device)

        def step():
            a, b, q = tensors
            loss = multiscale_itm_loss(a, b, there, patch_relevance=q, mode=mode, patch_mask=own_mask)
            logits = module(a[:, 0], b, there.image_index, there.text_index)
            return [loss, *torch.autograd.grad(loss + itm_loss(logits, there.labels, there.weights), tensors)]

        first = step()
        with nothing_waits():
            again = step()
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
        return [t.detach().cpu().double() for t in again]

    for got, want in zip(run(DEVICE), run("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=float(8 * torch.finfo(dtype).eps * want.abs().max()))
