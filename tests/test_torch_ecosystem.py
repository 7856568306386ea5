"""The losses among PyTorch's own tools: compiled training steps, torch.func, AMP, CUDA graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from step_cases import LOSSES, made, train

import fastvlm_loss
from fastvlm_loss import clip_loss, siglip_loss
from fastvlm_loss.engine.ops import KEPT_PRODUCTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_loss = pytest.mark.parametrize("name", LOSSES)


def test_every_loss_that_the_package_offers_is_here():
    offered = {n for n in fastvlm_loss.__all__ if n.endswith("_loss")} | {"linear_cross_entropy"}
    assert offered == set(LOSSES)


def compiles(name, backend):
    torch.compiler.reset()
    eager, step = made(name), made(name)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for got, want in zip(train(step, compiled), train(eager, eager), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@by_loss
def test_a_training_step_is_one_graph(name):
    compiles(name, "aot_eager")


def test_so_is_one_whose_gradients_are_made_along_with_the_loss(monkeypatch):
    """As of any vocabulary that is not small."""
    for backend in KEPT_PRODUCTS:
        monkeypatch.setitem(KEPT_PRODUCTS, backend, 0)
    assert "Weighted" in str(made("linear_cross_entropy")().grad_fn.next_functions)
    compiles("linear_cross_entropy", "aot_eager")


@pytest.mark.slow
@by_loss
def test_a_training_step_is_one_graph_of_inductor(name):
    compiles(name, "inductor")


def alone(name):
    """A loss as a function of its first features."""
    step = made(name)
    first, *_ = step.raw
    given = {**step.raw, **step.learned, **step.options, **({} if step.head is None else {"head": step.head})}
    return lambda x: step.loss(**{**given, first: x}).sum(), step.raw[first]


@by_loss
def test_transforms_and_second_derivatives_of_the_dense_backend(name):
    loss, x = alone(name)
    v = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    near = {"rtol": 1e-4, "atol": 1e-4}
    with fastvlm_loss.backend("dense"):
        torch.testing.assert_close(torch.func.grad(loss)(x), want, **near)
        two = torch.func.vmap(loss)(torch.stack([x, x + 0.1 * v]))
        torch.testing.assert_close(two, torch.stack([loss(x), loss(x + 0.1 * v)]), **near)
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        second = torch.autograd.grad((first * v).sum() + 0 * leaf.sum(), leaf)[0]  # of a hinge 0
        torch.testing.assert_close(torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x), second, **near)
        if name != "graded_clip_loss":  # PyTorch's embedding_bag has no forward mode
            torch.testing.assert_close(torch.func.jvp(loss, (x,), (v,))[1], (want * v).sum(), **near)
            torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1], second, **near)


@by_loss
def test_every_other_backend_refuses_them_in_one_sentence(name):
    loss, x = alone(name)
    for transformed in (
        torch.func.grad(loss),
        torch.func.hessian(loss),
        lambda x: torch.func.vmap(loss)(x[None]),
        lambda x: torch.func.jvp(loss, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"no torch\.func transforms; compute this loss under .*'dense'"):
            transformed(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode; compute"):
        loss(torch.autograd.forward_ad.make_dual(x, x))
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; compute"):
        first.sum().backward()


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_a_compiled_graph_refuses_them_too(loss):
    """Whose tangents would else be 0: the operators are opaque."""
    x, y = torch.randn(2, 4, 8)
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda x: loss(x, y, 5.0), (x,), (x,)), fullgraph=True, backend="eager"
    )
    with pytest.raises(RuntimeError, match=r"no torch\.func transforms"):
        compiled(x)


def mixed(name, backend, dtype):
    """Loss and gradients under autocast, through a loss scaler, and whether its step is that of SGD."""
    step, scaler = made(name), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, optimizer = copy.deepcopy([*step.parameters()]), torch.optim.SGD(step.parameters(), 0.1)
    with fastvlm_loss.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = step().sum()
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "something overflowed"
    for old, new in zip(before, step.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * new.grad)
    return [loss.detach(), *(p.grad for p in step.parameters())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_loss
def test_autocast_with_a_loss_scaler_is_within_twice_the_error_of_dense(name, dtype):
    exact = mixed(name, "dense", torch.float32)
    for got, dense, want in zip(mixed(name, "auto", dtype), mixed(name, "dense", dtype), exact, strict=True):
        budget = 2 * (dense - want).norm() + 4 * (torch.finfo(dtype).eps * want.norm() + torch.finfo(torch.float32).eps)
        assert (got - want).norm() <= budget


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_a_graphed_loss_replays_forward_and_backward(loss):
    """`make_graphed_callables` captures both."""

    def leaves(seed):
        g = torch.Generator("cuda").manual_seed(seed)
        x, y = (F.normalize(torch.randn(300, 64, generator=g, device="cuda"), dim=1).requires_grad_() for _ in range(2))
        return x, y, torch.full((), 10.0 + seed, device="cuda", requires_grad=True)

    graphed = torch.cuda.make_graphed_callables(loss, leaves(0))
    for seed in (1, 2):
        results = []
        for function in (graphed, loss):
            tensors = leaves(seed)
            value = function(*tensors)
            value.backward()
            results.append([value.detach().clone(), *(t.grad.clone() for t in tensors)])
        assert all(torch.equal(*both) for both in zip(*results, strict=True))
