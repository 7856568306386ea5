"""lightly's NTXentLoss and ours: loss, gradients, memory bank, processes, a short training."""

import copy

import pytest
import torch
import torch.distributed as dist
from drop_in_cases import BUDGET, NoMatrix, agree, evaluated, run

lightly = pytest.importorskip("lightly.loss")
from benchmarks.dropin.lightly import trained  # noqa: E402
from fastvlm_loss.integrations.lightly import NTXentLoss  # noqa: E402


def views(n, d=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return [(x + 0.7 * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0, -0.5])
@pytest.mark.parametrize("n", [1, 2, 37])
def test_the_same_loss_and_gradients(n, temperature, dtype):
    agree(NTXentLoss(temperature), lightly.NTXentLoss(temperature), views(n, dtype=dtype))


def test_it_is_one_of_theirs_with_their_defaults():
    ours, theirs = NTXentLoss(), lightly.NTXentLoss()
    assert isinstance(ours, lightly.NTXentLoss)
    assert ours.temperature == theirs.temperature == 0.5
    assert list(ours.state_dict()) == list(theirs.state_dict())
    agree(NTXentLoss(0.5, 0, False), theirs, views(5))


def banks(size, temperature, dtype=torch.float64):
    """Both losses with the same bank, kept in `dtype` (lightly needs that of the views)."""
    ours = NTXentLoss(temperature, size).to(dtype)
    theirs = lightly.NTXentLoss(temperature, size).to(dtype)
    theirs.memory_bank = copy.deepcopy(ours.memory_bank)
    return ours, theirs


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("size", [(40, 12), (64, 12), (7, 12)])
def test_a_memory_bank_changes_as_theirs(size, dtype):
    ours, theirs = banks(size, 0.2, dtype)
    for step in range(6):  # past the end, where the rest of a batch is dropped
        given = views(10, dtype=dtype, seed=step)
        if step == 3:  # of what needs no gradient nothing is stored
            assert torch.allclose(ours(*given), theirs(*given))
        else:
            (a, da), (b, db) = evaluated(ours, given), evaluated(theirs, given)
            assert (a - b).abs() <= BUDGET[dtype] * b
            for g, h in zip(da, db, strict=True):
                assert (g - h).abs().max() <= BUDGET[dtype] * h.abs().max()
        assert torch.allclose(ours.memory_bank.bank, theirs.memory_bank.bank)
        assert ours.memory_bank.bank_ptr == theirs.memory_bank.bank_ptr


def test_a_bank_in_fp32_serves_views_in_fp64_and_bf16():
    ours, theirs = banks((24, 12), 0.2, torch.float32)
    want = theirs(*views(9, dtype=torch.float32))
    for dtype in (torch.float64, torch.bfloat16):
        found = ours(*views(9, dtype=dtype))
        assert abs(found.item() - want.item()) < (1e-5 if dtype == torch.float64 else 3e-2)


@pytest.mark.parametrize("size", [0, (32, 12)])
def test_under_autocast_it_is_nearer_to_fp32(size):
    ours, theirs = banks(size, 0.1, torch.float32)
    given = [t.requires_grad_() for t in views(40, dtype=torch.float32)]
    exact = theirs(*(t.detach() for t in given))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(*given), theirs(*given)
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (want - exact).abs() + 4e-3
    got.backward()
    assert given[0].grad.dtype == torch.float32 and given[0].grad.isfinite().all()


@pytest.mark.parametrize("size", [0, (1100, 8)])
def test_no_matrix_is_built(size):
    n = 1100
    given = [t.requires_grad_() for t in views(n, 8, torch.float32)]
    loss = NTXentLoss(0.5, size)
    with NoMatrix(n * n):
        loss(*given).backward()
    with pytest.raises(AssertionError, match="returned"), NoMatrix(n * n):
        lightly.NTXentLoss(0.5, size)(*given)


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        NTXentLoss(temperature)


@pytest.mark.parametrize("size", [-1, 10, (1, 2, 3)])
def test_what_they_refuse_is_refused(size):
    with pytest.raises(ValueError, match=r"[Mm]emory bank size"):
        NTXentLoss(0.5, size)


def test_views_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"out1: got \[4, 3\], wanted \[5, 3\]"):
        NTXentLoss()(torch.randn(5, 3), torch.randn(4, 3))


def gathered(rank, world):
    """The largest difference of loss and gradients in this process, with and without a bank."""
    found = []
    for size in (0, (30, 12)):
        torch.manual_seed(3)
        ours = NTXentLoss(0.2, size, gather_distributed=True).double()
        theirs = lightly.NTXentLoss(0.2, size, gather_distributed=True).double()
        theirs.memory_bank = copy.deepcopy(ours.memory_bank)
        for step in range(2):
            given = views(8, seed=10 * step + rank)
            (a, da), (b, db) = evaluated(ours, given), evaluated(theirs, given)
            found += [(a - b).abs().item(), *((g - h).abs().max().item() for g, h in zip(da, db, strict=True))]
        found.append((ours.memory_bank.bank - theirs.memory_bank.bank).abs().max().item() if size else 0.0)
    uneven = NTXentLoss(0.2, gather_distributed=True)  # which lightly cannot
    sizes = (3, 5)
    parts = [views(n, seed=n) for n in sizes]
    loss = uneven(*parts[rank])
    x0, x1 = (torch.cat([p[k] for p in parts]) for k in range(2))
    whole = NTXentLoss(0.2)(x0, x1) * sum(sizes)
    share = loss * sizes[rank]
    dist.all_reduce(share)
    return max(found), abs(share.item() - whole.item())


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_agree_with_theirs():
    for difference, of_sizes in run(2, gathered):
        assert difference < 1e-9
        assert of_sizes < 1e-9


@pytest.mark.parametrize("size", [0, (96, 16)])
def test_a_training_is_the_same(size):
    ours, theirs = trained(NTXentLoss, size), trained(lightly.NTXentLoss, size)
    assert max(ours) - min(ours) > 0.2  # something was learned
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
