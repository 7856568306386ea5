"""Shared: the backends that are live here, and random unit features."""

import pytest
import torch
import torch.nn.functional as F

from fastvlm_loss.backends import cpp

LIVE = ["torch"] + ([] if cpp.unavailable() else ["cpp"])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LIVE)
def live_backend(request):
    return request.param


@pytest.fixture
def pair():
    def make(m=50, d=32, n=None, dtype=torch.float32, seed=0, noise=2.0):
        g = torch.Generator().manual_seed(seed)
        y = F.normalize(torch.randn(m if n is None else n, d, generator=g), dim=1)
        x = F.normalize(y[torch.arange(m) % len(y)] + noise * torch.randn(m, d, generator=g) / d**0.5, dim=1)
        return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()

    return make
