"""The cached step on a GPU: dropout's masks, autocast, a loss scaler, memory.

With FASTVLM_TEST_DEVICE=cpu it runs without one, all but the memory.
"""

import os

import pytest
import torch
from gradcache_cases import ULPS, assert_near, batch, by_one_backward, gradients, make

from fastvlm_loss import backend, cached_step

DEVICE = os.environ.get("FASTVLM_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.gpu if DEVICE != "cpu" else []


def setting(dropout=0.4):
    return make(dropout=dropout).to(DEVICE), [side.to(DEVICE) for side in batch(50)]


@pytest.mark.parametrize("micro_batch", [8, 50])
def test_dropout_draws_the_same_masks_and_the_stream_goes_on(micro_batch):
    model, sides = setting()
    with backend("torch"):
        torch.manual_seed(5)
        value, want = by_one_backward(model, *sides, micro_batch)
        after = torch.rand(3, device=DEVICE)
        torch.manual_seed(5)
        cached = cached_step(
            model.encode_image, model.encode_text, *sides, model.loss, micro_batch=micro_batch, check_replay=True
        )
    assert torch.equal(torch.rand(3, device=DEVICE), after)
    torch.testing.assert_close(cached, value)
    assert_near(gradients(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_loss_scaler(dtype):
    """No further from fp32 than twice the plain step, and a few roundings of the dtype."""
    model, sides = setting(dropout=0.0)
    want = by_one_backward(model, *sides)[1]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)

    def errors(micro_batch):
        with torch.autocast(DEVICE, dtype):
            cached_step(
                model.encode_image, model.encode_text, *sides, model.loss, micro_batch=micro_batch, check_replay=True,
                backward=lambda value: scaler.scale(value).backward(),
            )  # fmt: skip
        return {name: (g / 1024 - want[name]).norm() for name, g in gradients(model).items()}

    plain = errors(None)
    for name, error in errors(8).items():
        assert error <= 2 * plain[name] + ULPS * torch.finfo(dtype).eps * want[name].norm() + 1e-6, name


def test_the_memory_is_that_of_one_micro_batch():
    if DEVICE == "cpu":
        pytest.skip("counted by CUDA's allocator")
    model = make().to(DEVICE)
    sides = [side.to(DEVICE) for side in batch(2**18)]

    def peak(micro_batch):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = lambda x, y: (x * y).sum() / len(x) * model.logit_scale  # noqa: E731
        cached_step(model.encode_image, model.encode_text, *sides, loss, micro_batch=micro_batch)
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    peak(2**12), peak(None)  # whatever is loaded at first
    features = sum(len(side) * 8 * 4 for side in sides)
    assert peak(2**12) < 4 * features < peak(None)
