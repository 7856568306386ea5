"""The engine itself: fp64 gradcheck of the kernels' maths, invariances, the op boundary, torch.compile."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastvlm_loss
from fastvlm_loss import CLIPLoss, clip_loss
from fastvlm_loss.backends import cpp
from fastvlm_loss.backends import torch as chunked
from fastvlm_loss.engine import tile
from fastvlm_loss.engine.dispatch import resolve
from fastvlm_loss.engine.ops import GRADIENT, KEPT_PRODUCTS, STATISTICS, SWEEP
from fastvlm_loss.engine.weights import SUMS
from fastvlm_loss.losses import registry
from fastvlm_loss.scores import filters
from fastvlm_loss.scores.problem import Problem
from fastvlm_loss.scores.statistics import Hinge, Softmax
from fastvlm_loss.testing import Case, evaluate, inputs

LIVE = ["torch"] + ([] if cpp.unavailable() else ["cpp"])
needs_cpp = pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable())


def smooth(options):
    """Whether the gradient is by intention not that of the value: something is detached that depends on it."""
    own_scale = "teacher_image_features" in options and "teacher_scale" not in options
    return not options.get("detach_weights") and not own_scale


VARIANTS = [(spec, k) for spec in registry.values() for k, o in enumerate(spec.variants) if smooth(o)]


@pytest.mark.parametrize(("spec", "k"), VARIANTS, ids=[f"{spec.name}-{k}" for spec, k in VARIANTS])
def test_gradcheck(spec, k):
    case = Case(m=9, d=5, dtype=torch.float64, scale=5.0, bias=0.5, options=spec.variants[k], seed=k)
    tensors, options = inputs(spec, case)
    wide = [t.detach().double().requires_grad_() for t in tensors.values()]
    with fastvlm_loss.backend("torch"):
        assert torch.autograd.gradcheck(
            lambda *values: spec.function(**dict(zip(tensors, values, strict=True)), **options), wide
        )


def test_any_function_of_the_statistics_differentiates(pair):
    # debiased contrastive loss as plain PyTorch over O(N) vectors, no gradient formula of its own
    def debiased(problem):
        t = tile.softmax(problem, gap=True)
        return (torch.log1p((t.row_nll.expm1() - 0.01).clamp_min(1e-6)) * t.gap[30:].exp()).mean()

    x, y = (t.detach().double().requires_grad_() for t in pair(30, 8))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    results = []
    for name in ("torch", "dense"):
        with fastvlm_loss.backend(name):
            value = debiased(Problem.of(x, y, scale))
            results.append((value, *torch.autograd.grad(value, (x, y, scale))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("side", [1, 3, 16, 64])
def test_tile_size_does_not_matter(pair, monkeypatch, side):
    x, y = (t.detach().double().requires_grad_() for t in pair(50, 8))
    ids = torch.arange(50) // 3
    results = []
    for size in (1000, side):
        monkeypatch.setitem(chunked.TILE, "cpu", size)
        with fastvlm_loss.backend("torch"):
            loss = clip_loss(x, y, 30.0, label_smoothing=0.1, image_ids=ids)
        results.append((loss, *torch.autograd.grad(loss, (x, y))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_merging_shards_of_the_columns_is_the_whole(pair):
    x, y = (t.detach().double() for t in pair(20, 8, n=60))
    statistic = Softmax(rows=True, cols=False, gap=True)
    target = torch.randint(0, 60, (20,))
    scale = torch.tensor(7.0, dtype=torch.float64)
    whole, *_ = chunked.statistics(Problem(x, y, scale, None, target), statistic)
    merged = statistic.identity(x, torch.float64, 20)
    for c in range(0, 60, 25):
        inside = (target >= c) & (target < c + 25)
        shard = Problem(x, y[c : c + 25], scale, None, torch.where(inside, target - c, -1))
        merged = torch.stack(statistic.merge(merged, chunked.statistics(shard, statistic)[0]))
    torch.testing.assert_close(merged, whole, rtol=1e-13, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(pair, dtype):
    x, y = pair(1700, 40, n=1700, dtype=dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastvlm_loss.backend("cpp"):
                loss = clip_loss(x, y, 20.0, label_smoothing=0.1)
            results.append((loss, *torch.autograd.grad(loss, (x, y))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def arguments(options, pair, build=lambda p: p):
    x, y = pair(20, 8)
    problem = build(Problem.of(x, y, 5.0, 1.0, **options))
    targets = [t for t in problem.targets() if t is not None]
    fields = (t if t is None else t.detach() for t in problem.tensors())
    return (*fields, torch.cat(targets) if targets else None)


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": torch.arange(20).flip(0), "image_ids": torch.arange(20) // 2, "text_ids": torch.arange(20) // 2}],
)
def test_opcheck(pair, live_backend, options):
    problem = arguments(options, pair)
    for flags, keep in ((7, True), (3, False)):
        torch.library.opcheck(STATISTICS[live_backend], (*problem, "softmax", flags, keep))
        nll, _, state, products = STATISTICS[live_backend](*problem, "softmax", flags, keep)
        cotangents = torch.rand_like(nll), torch.rand_like(nll) if flags & 4 else None
        for need in ((True, True, True, True), (False, True, False, False)):
            given = (*problem, state, products, *cotangents, "softmax", flags, *need)
            torch.library.opcheck(GRADIENT[live_backend], given)


LIMIT = filters.absolute(0.1)
OTHERS = {
    "taught": (lambda p: p.taught(p.x.detach(), p.y.detach(), 2.0), Softmax(teacher=True)),
    "limited": (lambda p: filters.filtered(p, LIMIT), Softmax(limit=True, hardest=True)),
    "hard": (lambda p: replace(p, numbers=torch.tensor([0.5, 0.0])), Softmax(hardness=True)),
    "hinge": (lambda p: p.weighted(None, None), Hinge(hardest=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_opcheck_of_other_statistics(pair, live_backend, name):
    build, statistic = OTHERS[name]
    problem, how = arguments({}, pair, build), (statistic.name, statistic.flags)
    torch.library.opcheck(STATISTICS[live_backend], (*problem, *how, True))
    nll, _, state, products = STATISTICS[live_backend](*problem, *how, True)
    cotangents = torch.rand_like(nll), torch.rand_like(nll) if statistic.gap else None
    torch.library.opcheck(
        GRADIENT[live_backend], (*problem, state, products, *cotangents, *how, True, True, True, False)
    )


def test_opcheck_of_the_sweep(pair):
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(SWEEP["torch"], (*arguments({}, pair)[:-1], *need))
        torch.library.opcheck(SUMS, (*arguments({}, pair, lambda p: p.weighted(None, None))[:-1], *need[:2]))


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_every_loss_compiles_in_one_graph(spec):
    torch._dynamo.reset()
    tensors, options = inputs(spec, Case(m=12, d=8, options=spec.variants[-1], bias=-1.0))
    compiled = torch.compile(lambda t, o: spec.function(**t, **o), fullgraph=True, backend="aot_eager")

    def call(**given):
        return compiled({k: given[k] for k in tensors}, {k: given[k] for k in options})

    want, got = evaluate(spec.function, tensors, options), evaluate(call, tensors, options)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(pair, live_backend, dynamic):
    torch._dynamo.reset()
    loss = CLIPLoss(label_smoothing=0.1)
    log_scale = torch.tensor(2.0, requires_grad=True)
    tower = torch.nn.Linear(32, 32)
    ids = torch.arange(60) // 2

    def step(x, y, ids):
        return loss(tower(x), y, log_scale.exp(), normalize=True, image_ids=ids)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with fastvlm_loss.backend(live_backend):
        for m in (60, 40) if dynamic else (60,):
            x, y = pair(m)
            results = [
                (value := f(x, y, ids[:m]), *torch.autograd.grad(value, (x, y, log_scale, tower.weight)))
                for f in (step, compiled)
            ]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_labels_are_checked_in_a_compiled_graph(pair):
    torch._dynamo.reset()
    x, y = pair(8)
    compiled = torch.compile(lambda labels: clip_loss(x, y, 5.0, labels=labels), fullgraph=True)
    torch.testing.assert_close(compiled(torch.arange(8)), clip_loss(x, y, 5.0))
    with pytest.raises(RuntimeError, match=r"out of (range|bounds)"):
        compiled(torch.arange(8) + 1)


def test_fake_and_meta_tensors_have_the_right_shape():
    x, y = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(6, 4, device="meta")
    loss = clip_loss(x, y, 5.0)
    assert loss.shape == () and loss.device.type == "meta"
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = clip_loss(torch.empty(6, 4, dtype=torch.bfloat16), torch.empty(6, 4, dtype=torch.bfloat16), 5.0)
        assert fake.shape == () and fake.dtype == torch.float32
        assert clip_loss(torch.empty(6, 4), torch.empty(3, 4), 5.0, labels=torch.zeros(6).long()).shape == ()
    assert clip_loss(x, y[:3], 5.0, labels=torch.zeros(6, device="meta").long()).shape == ()


def test_backend_blocks_nest_and_reach_backward(pair):
    x, y = pair(10)
    with fastvlm_loss.backend("torch"):
        with fastvlm_loss.backend("dense"):
            dense = clip_loss(x, y, 5.0)
        chunk = clip_loss(x, y, 5.0)
    assert "Statistics" not in str(dense.grad_fn) and dense.item() == pytest.approx(chunk.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(chunk, x), torch.autograd.grad(dense, x))


def test_a_backend_is_forced_for_its_thread_alone(pair):
    x, y = pair(10)
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with fastvlm_loss.backend("dense"):
            entered.set()
            leave.wait()
            seen.append("Statistics" not in str(clip_loss(x, y, 5.0).grad_fn))

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with fastvlm_loss.backend("torch"):
        leave.set()
        thread.join()
        assert resolve(Problem.of(x, y, 5.0), Softmax()) == "torch"
    assert seen == [True] and resolve(Problem.of(x.double(), y.double(), 5.0), Softmax()) == "torch"


def test_autocast_changes_no_backends_meaning(pair):
    x, y = pair(64)
    values = []
    for name in ("dense", *LIVE):
        with fastvlm_loss.backend(name), torch.autocast("cpu", torch.bfloat16):
            values.append(clip_loss(x, y, 100.0))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_the_loss(pair, reentrant):
    x, y = pair(30)
    plain = torch.autograd.grad(clip_loss(x, y, 5.0), (x, y))
    torch.utils.checkpoint.checkpoint(lambda a, b: clip_loss(a, b, 5.0), x, y, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, plain[0]) and torch.equal(y.grad, plain[1])


@pytest.mark.parametrize("keep", [True, False])
def test_a_frozen_tower_costs_nothing_in_backward(pair, live_backend, keep, monkeypatch):
    if not keep:
        monkeypatch.setitem(KEPT_PRODUCTS, live_backend, 0)
    x, y = pair(20)
    asked = []
    real = GRADIENT[live_backend]
    monkeypatch.setitem(GRADIENT, live_backend, lambda *a: asked.append(a[-4:-2]) or real(*a))
    for frozen_x, frozen_y in ((True, False), (False, True), (True, True)):
        a, b = (t.detach() if frozen else t for t, frozen in ((x, frozen_x), (y, frozen_y)))
        scale = torch.tensor(5.0, requires_grad=True)
        with fastvlm_loss.backend(live_backend):
            clip_loss(a, b, scale).backward()
        assert asked.pop() == (not frozen_x, not frozen_y)
    problem = arguments({}, pair)
    state = STATISTICS[live_backend](*problem, "softmax", 3, keep)[2:]
    dx, dy, *_ = real(*problem, *state, torch.rand(40), None, "softmax", 3, False, True, True, False)
    assert dx.shape == (0,) and dy.shape == (20, 8)


@pytest.mark.parametrize(
    ("m", "n", "rows", "cols"), [(20, 8, 20, 3), (20, 8, 7, 8), (100, 1700, 0, 1600), (1, 9, 1, 0)]
)
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_of_first_rows_are_those_of_all(pair, live_backend, m, n, rows, cols, keep):
    x, y = pair(m, 8, n=n)
    problem = Problem.of(x, y, 5.0, 1.0, labels=torch.arange(m) % n)
    given = *(t if t is None else t.detach() for t in problem.tensors()), torch.cat(problem.targets())
    state = STATISTICS[live_backend](*given, "softmax", 3, keep)[2:]
    wanted = *given, *state, torch.rand(m + n), None, "softmax", 3, True, True, True, False
    swept = *given[:-1], True, True, True
    for all_, first in ((GRADIENT[live_backend](*wanted), GRADIENT[live_backend](*wanted, rows, cols)),
                        (SWEEP[live_backend](*swept)[1:], SWEEP[live_backend](*swept, rows, cols)[1:])):  # fmt: skip
        assert first[0].shape == (rows, 8) and first[1].shape == (cols, 8)
        for a, b in zip(all_, first, strict=True):
            torch.testing.assert_close(a[: len(b)] if b.dim() else a, b, rtol=1e-6, atol=1e-7)
    torch.library.opcheck(GRADIENT[live_backend], (*wanted, rows, cols))
    torch.library.opcheck(SWEEP[live_backend], (*swept, rows, cols))


def test_columns_without_gradient_cost_no_product(pair):
    def operations(onto, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    x, y = (t.detach() for t in pair(64, 8, n=1024))
    problem, statistic = Problem.of(x, y, 5.0, labels=torch.arange(64)), Softmax()
    operands, flops = torch.rand(statistic.operands, 64 + 1024), []
    for cols in (1024, 64, None):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: operations}) as count:
            chunked.gradient(problem, statistic, x.new_empty(0), operands, 1.0, 64, cols, True, False)
        flops.append(count.get_total_flops())
    product = 2 * 64 * 8
    assert flops == [3 * 1024 * product, (2 * 1024 + 64) * product, 2 * 1024 * product]


def test_registering_twice_is_refused():
    from fastvlm_loss.losses._spec import register

    with pytest.raises(ValueError, match="got 'clip_loss' twice"):
        register(registry["clip_loss"])
