"""The kernels in the company of CUDA and PyTorch: streams, graphs, devices, offsets past 2^31, compilers, autocast."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import fastvlm_loss
from fastvlm_loss import CLIPLoss, clip_loss

pytestmark = pytest.mark.gpu
OPTIONS = [{}, {"label_smoothing": 0.1, "image_ids": True, "text_weights": True}]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed-ids-weights"])


def leaves(m, d=64, n=None, dtype=torch.bfloat16, device="cuda", seed=0):
    """Features of about unit norm and a scale, that require gradients."""
    g = torch.Generator(device).manual_seed(seed)
    x, y = (torch.randn(k, d, generator=g, device=device, dtype=dtype) / d**0.5 for k in (m, m if n is None else n))
    return [x.requires_grad_(), y.requires_grad_(), torch.full((), 14.3, device=device, requires_grad=True)]


def step(tensors, options=None):
    """Loss and gradients; options that are True become ids or weights on the features' device."""
    x, y, _ = tensors
    made = {
        "image_ids": lambda: torch.arange(len(x), device=x.device) // 2,
        "text_weights": lambda: torch.linspace(0, 1, len(y), device=y.device),
    }
    loss = clip_loss(*tensors, **{k: made[k]() if v is True else v for k, v in (options or {}).items()})
    return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]


def assert_same_bits(a, b):
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def assert_near(got, want, relative):
    for a, b in zip(got, want, strict=True):
        error, size = (a - b).abs().max().item(), b.abs().max().item()  # in place of double(): some fill the memory
        assert error <= relative * size, f"error {error:.2e}, largest value {size:.2e}"


@contextmanager
def synchronising_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_options
@pytest.mark.parametrize("m", [100, 3000])
def test_the_host_never_waits(m, options):
    tensors = leaves(m)
    step(tensors, options)  # compiles
    with synchronising_is_an_error():
        step(tensors, options)
        with pytest.raises(RuntimeError, match="synchroniz"):
            tensors[0].sum().item()


@by_options
@pytest.mark.parametrize("m", [100, 3000])
def test_a_cuda_graph_replays_on_new_data(m, options):
    tensors = leaves(m)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(tensors, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, options)
    for seed in (1, 2):
        with torch.no_grad():
            for tensor, new in zip(tensors, leaves(m, seed=seed), strict=True):
                tensor.copy_(new * (1 + seed / 4))
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert_same_bits(replayed, step(tensors, options))


def test_a_side_stream_needs_no_other():
    tensors = leaves(2000)
    want = step(tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream now comes too early
        late = [(t.detach() * 1).requires_grad_() for t in tensors]
        got = step(late)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_features_on_a_device_that_is_not_current():
    here, there = leaves(300), [t.detach().to("cuda:1").requires_grad_() for t in leaves(300)]
    assert torch.cuda.current_device() == 0
    got = step(there)
    assert all(t.device.index == 1 for t in got)
    assert_same_bits([t.to("cuda:0") for t in got], step(here))
    with torch.cuda.device(1):
        assert_same_bits(step(here), [t.to("cuda:0") for t in got])


def needs_memory(size):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < size, reason=f"needs {size / 1e9:.0f} GB of GPU memory")


@needs_memory(80e9)
@pytest.mark.parametrize("swap", [False, True])
def test_features_of_more_than_two_to_the_31_elements(swap):
    n = 2**25 + 77
    x, y, scale = leaves(65, n=n)
    label = n - 1 - 3 * torch.arange(65, device="cuda")  # the far end counts
    if swap:  # as many images as that, of which 65 have a text
        target = torch.full((n,), -1, device="cuda")
        target[label] = torch.arange(65, device="cuda")
        x, y, label = y, x, target
    results = []
    for name in ("triton", "torch"):
        with fastvlm_loss.backend(name):
            loss = clip_loss(x, y, scale, labels=label, directions="text" if swap else "image")
            results.append([loss.detach(), *torch.autograd.grad(loss, (x, y, scale))])
    got, want = results
    assert want[1][-200:].any() and want[2][-60:].any()
    assert_near(got[:1], want[:1], 1e-5)
    assert_near(got[1:], want[1:], 2 * torch.finfo(torch.bfloat16).eps)


@needs_memory(30e9)
def test_more_than_two_to_the_32_scores():
    tensors = leaves(66000)
    got = step(tensors)
    with fastvlm_loss.backend("torch"):
        want = step(tensors)
    assert_near(got[:1], want[:1], 1e-5)
    assert_near(got[1:], want[1:], 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    loss, tower = CLIPLoss(label_smoothing=0.1), torch.nn.Linear(64, 64, device="cuda")
    log_scale = torch.tensor(2.0, device="cuda", requires_grad=True)

    def training(x, y, ids):
        return loss(tower(x), y, log_scale.exp(), normalize=True, image_ids=ids)

    compiled = torch.compile(training, fullgraph=True, dynamic=dynamic)
    for m in (260, 140) if dynamic else (260,):
        x, y, _ = leaves(m, dtype=torch.float32)
        ids = torch.arange(m, device="cuda") // 2
        results = []
        for function in (training, compiled):
            value = function(x, y, ids)
            results.append([value.detach(), *torch.autograd.grad(value, (x, y, log_scale, tower.weight))])
        assert_near(results[1], results[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_loss_scaler(dtype):
    torch.manual_seed(0)
    tower = torch.nn.Linear(64, 64, device="cuda")
    log_scale = torch.tensor(2.66, device="cuda", requires_grad=True)
    wanted = [tower.weight, log_scale]
    x, y, _ = leaves(300, dtype=torch.float32)

    def value():
        return clip_loss(tower(x), y, log_scale.exp(), normalize=True)

    exact = torch.autograd.grad(value(), wanted)
    optimizer = torch.optim.SGD(wanted, lr=0.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    with torch.autocast("cuda", dtype):
        loss = value()
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_near([t.grad for t in wanted], exact, 0.05)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() >= 2.0**14  # nothing overflowed


def test_many_threads_compute_what_one_does():
    tensors = leaves(1000)
    want = step(tensors)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: step(tensors), range(8)):
            assert_same_bits(got, want)
