"""What the tests of the integrations share: a loss beside the one that it replaces, and no matrix of all pairs."""

from __future__ import annotations

import copy
import socket

import group_cases
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


class NoMatrix(TorchDispatchMode):
    """Fails where an operator, of forward or backward, returns as many numbers as there are pairs.

    Beside encoders, whose activations may be as large, `side` says that only matrices of that side count.
    """

    def __init__(self, pairs, side=None):
        super().__init__()
        self.pairs, self.side = pairs, side

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(found):
            if isinstance(t, torch.Tensor):
                small = t.numel() < self.pairs if self.side is None else t.shape[-2:] != (self.side, self.side)
                assert small, f"{func} returned {list(t.shape)}"
        return found


def evaluated(loss, tensors):
    """The loss of tensors and its gradients, detached."""
    tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    learned = [t for t in tensors if t.requires_grad]
    value = loss(*tensors)
    gradients = torch.autograd.grad(value, learned, allow_unused=True)
    return value.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(learned, gradients, strict=True)]


def differences(ours, theirs, tensors, scale=1e-3):
    """Relative differences of the loss and of the gradients, to the largest of each."""
    theirs = copy.deepcopy(theirs) if isinstance(theirs, torch.nn.Module) else theirs
    (a, da), (b, db) = evaluated(ours, tensors), evaluated(theirs, tensors)
    of_loss = (a.double() - b.double()).abs().item() / max(b.abs().item(), scale)
    of_gradients = [
        (g.double() - h.double()).abs().max().item() / max(h.abs().max().item(), scale)
        for g, h in zip(da, db, strict=True)
    ]
    return of_loss, max(of_gradients)


BUDGET = {torch.float64: 1e-9, torch.float32: 1e-5}


def agree(ours, theirs, tensors, budget=None):
    """Assert that both have one loss and its gradients, within the budget of the tensors' dtype."""
    budget = budget or BUDGET[next(t.dtype for t in tensors if t.is_floating_point())]
    of_loss, of_gradients = differences(ours, theirs, tensors)
    assert of_loss <= budget, f"loss is off by {of_loss:.2e}"
    assert of_gradients <= budget, f"gradients are off by {of_gradients:.2e}"


def run(world, job):
    """What each of `world` processes returns; forked, because to import the packages once more takes far longer."""
    assert dist.is_gloo_available()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        given = world, port, job, results
        mp.start_processes(group_cases.main, given, nprocs=world, start_method="fork")
        return [results[rank] for rank in range(world)]
