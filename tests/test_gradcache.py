"""The cached step makes the gradients of one backward, in the memory of one micro-batch, and leaves no trace."""

import random

import pytest
import torch
import torch.nn.functional as F
from gradcache_cases import assert_near, batch, by_one_backward, gradients, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvlm_loss import cached_step


def step(model, images, texts, micro_batch=4, **options):
    value = cached_step(
        model.encode_image, model.encode_text, images, texts, model.loss, micro_batch=micro_batch, **options
    )
    assert not value.requires_grad and value.dim() == 0
    return value, gradients(model)


@pytest.mark.parametrize("micro_batch", [1, 4, 11, 50])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_whole_batch(dtype, loss, micro_batch):
    model, (images, texts) = make(dtype=dtype, loss=loss), batch(dtype=dtype)
    exact = by_one_backward(make(loss=loss).double(), images.double(), texts.double())[1]
    value, want = by_one_backward(model, images, texts)
    cached, got = step(model, images, texts, micro_batch)
    assert {"logit_scale", "common.weight", "image.body.0.weight", "text.body.4.bias"} <= got.keys()
    assert float(got["logit_scale"]) != 0
    torch.testing.assert_close(cached, value)
    assert_near(got, want, exact)


@pytest.mark.parametrize("micro_batch", [3, 8])
def test_dropout_draws_the_same_masks_and_the_stream_goes_on(micro_batch):
    model, (images, texts) = make(dropout=0.4), batch()
    torch.manual_seed(5)
    value, want = by_one_backward(model, images, texts, micro_batch)
    after = torch.rand(3)
    torch.manual_seed(5)
    cached, got = step(model, images, texts, micro_batch, check_replay=True)
    assert torch.equal(torch.rand(3), after) and torch.equal(cached, value)
    assert_near(got, want)
    other = step(model, images, texts, micro_batch)[1]  # another draw, to which the tolerance is not blind
    with pytest.raises(AssertionError):
        assert_near(other, want)


def test_random_numbers_of_the_loss_count_and_an_error_in_pass_2_puts_them_back():
    model, (images, texts) = make(dropout=0.4), batch()
    torch.manual_seed(5)
    cached_step(
        model.encode_image, model.encode_text, images, texts,
        lambda x, y: model.loss(x, y) * (1 + torch.rand(())), micro_batch=11,
    )  # fmt: skip
    after = torch.rand(3)
    torch.manual_seed(5)
    model.encode_image(images), model.encode_text(texts), torch.rand(())
    assert torch.equal(torch.rand(3), after)

    def fails(x):
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        calls.append(x)
        return model.encode_text(x)

    calls = []
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_step(model.encode_image, fails, images, texts, model.loss, micro_batch=6)
    torch.manual_seed(5)
    for part in (6, 5):
        model.encode_image(images[:part])
    for part in (6, 5):
        model.encode_text(texts[:part])
    wanted = torch.rand(3)
    calls.clear()
    torch.manual_seed(5)
    with pytest.raises(RuntimeError):
        cached_step(model.encode_image, fails, images, texts, model.loss, micro_batch=6)
    assert torch.equal(torch.rand(3), wanted)


def test_one_encoder_for_both_sides():
    model, (images, _) = make(), batch()
    model.loss(model.encode_image(images), model.encode_image(images.flip(1))).backward()
    want = gradients(model)
    cached_step(model.encode_image, model.encode_image, images, images.flip(1), model.loss, micro_batch=4)
    assert_near(gradients(model), want)


def test_a_frozen_tower_runs_once_and_the_loss_makes_no_gradient_for_it():
    model, (images, texts) = make(), batch()
    model.image.requires_grad_(False)
    model.common.requires_grad_(False)
    want = by_one_backward(model, images, texts)[1]
    model.image.calls.clear(), model.text.calls.clear()
    wanted = []
    cached_step(
        model.encode_image, model.encode_text, images, texts,
        lambda x, y: wanted.append((x.requires_grad, y.requires_grad)) or model.loss(x, y), micro_batch=4,
    )  # fmt: skip
    assert wanted == [(False, True)]
    assert [rows for rows, _ in model.image.calls] == [4, 4, 3]
    assert [rows for rows, _ in model.text.calls] == 2 * [4, 4, 3]
    assert_near(gradients(model), want)


def test_a_loss_that_ignores_a_side_gives_it_no_gradient():
    model, (images, texts) = make(), batch()
    cached_step(model.encode_image, model.encode_text, images, texts, lambda x, _: x[:, 0].sum(), micro_batch=4)
    assert not any(name.startswith(("text", "logit")) for name in gradients(model))
    assert len(model.text.calls) == 3 and len(model.image.calls) == 6


class Probe(torch.autograd.Function):
    """The identity; its backward notes whether autocast is on."""

    seen = ()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Probe.seen = (*Probe.seen, torch.is_autocast_enabled("cpu"))
        return g


@pytest.mark.parametrize("micro_batch", [4, None])
def test_autocast_is_the_callers_but_for_backward(micro_batch):
    model, (images, texts) = make(dropout=0.4), batch()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        size = micro_batch or 11
        # not model.loss of one graph: autocast keeps one bf16 copy of a weight, and would sum its gradients in bf16
        image = [model.encode_image(x) for x in images.split(size)]
        text = [model.encode_text(x) for x in texts.split(size)]
        value = model.loss(torch.cat(image), torch.cat(text))
    value.backward()
    want = gradients(model)
    model.image.calls.clear()
    Probe.seen = ()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model.encode_image(images)  # leaves casts of the weights in autocast's cache
            model.image.calls.clear()
        torch.manual_seed(5)
        cached = cached_step(
            lambda x: Probe.apply(model.encode_image(x)), model.encode_text, images, texts,
            lambda x, y: Probe.apply(model.loss(x, y)), micro_batch=micro_batch, check_replay=True,
        )  # fmt: skip
        assert torch.is_autocast_enabled("cpu")
    assert {dtype for _, dtype in model.image.calls} == {torch.bfloat16}
    assert Probe.seen == (False,) * (1 + len(images.split(size)))
    torch.testing.assert_close(cached, value.detach())
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        error, largest = (got[name] - value).abs().max(), value.abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * largest, name


def test_gradients_add_to_those_that_are_there():
    model, (images, texts) = make(), batch()
    want = by_one_backward(model, images, texts)[1]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    got = {name: g - 1 for name, g in step(model, images, texts)[1].items()}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=8 * torch.finfo(torch.float32).eps, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [4, None])
def test_backward_may_scale_the_loss(micro_batch):
    model, (images, texts) = make(), batch()
    value, want = by_one_backward(model, images, texts)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cached = cached_step(
        model.encode_image, model.encode_text, images, texts, model.loss,
        micro_batch=micro_batch, backward=lambda loss: scaler.scale(loss).backward(),
    )  # fmt: skip
    torch.testing.assert_close(cached, value)
    scaled = {name: p.grad / 1024 for name, p in model.named_parameters() if p.grad is not None}
    assert_near(scaled, want)
    before = model.logit_scale.item()
    scaler.step(optimizer)
    assert model.logit_scale.item() == pytest.approx(before - 0.1 * want["logit_scale"].item())


class Held:
    """A saved tensor; counts the bytes of those that are alive, and their peak."""

    now = peak = 0

    def __init__(self, t):
        self.t, self.size = t.detach(), t.numel() * t.element_size()  # an output would hold its graph, and that this
        Held.now += self.size
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.size


def peak(run):
    Held.now = Held.peak = 0
    run()
    assert Held.now == 0
    return Held.peak


def test_activations_are_those_of_one_micro_batch():
    model, (images, texts) = make(dropout=0.1), batch(64)

    def watched(encode):
        def encoder(x):
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.t):
                return encode(x)

        return encoder

    image, text = watched(model.encode_image), watched(model.encode_text)
    one = max(peak(lambda: image(images[:4])), peak(lambda: text(texts[:4])))
    whole = peak(lambda: cached_step(image, text, images, texts, model.loss, micro_batch=None))
    assert peak(lambda: cached_step(image, text, images, texts, model.loss, micro_batch=4)) == one
    assert whole > 20 * one


def test_features_do_not_hold_what_they_are_views_of():
    model, (images, texts) = make(), batch()
    alive = []

    def tokens(x):
        made = model.encode_image(x)[:, None].expand(-1, 7, -1).contiguous()
        alive.append(made.untyped_storage()._weak_ref())
        return made[:, 0]

    def loss(x, y):
        assert all(torch.UntypedStorage._expired(ref) for ref in alive[:-1])
        return model.loss(x, y)

    cached_step(tokens, model.encode_text, images, texts, loss, micro_batch=4)


def test_running_statistics_count_a_micro_batch_once():
    model, (images, texts) = make(norm=nn.BatchNorm1d), batch(12)
    model.register_buffer("expanded", torch.zeros(1).expand(5))
    by_one_backward(model, images, texts, 4)
    want = {name: b.clone() for name, b in model.named_buffers()}
    model = make(norm=nn.BatchNorm1d)
    model.register_buffer("expanded", torch.zeros(1).expand(5))
    step(model, images, texts)
    got = dict(model.named_buffers())
    assert int(got["image.body.3.num_batches_tracked"]) == 3
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_checkpointing_inside_an_encoder():
    model, (images, texts) = make(dropout=0.4), batch()
    torch.manual_seed(5)
    want = by_one_backward(model, images, texts, 4)[1]
    torch.manual_seed(5)
    cached_step(
        lambda x: checkpoint(model.encode_image, x, use_reentrant=False), model.encode_text, images, texts, model.loss,
        micro_batch=4, check_replay=True,
    )  # fmt: skip
    assert_near(gradients(model), want)


def test_a_compiled_encoder_draws_the_same_masks():
    model, (images, texts) = make(dropout=0.4), batch(12)
    compiled = torch.compile(model.image.body, backend="aot_eager")
    encode = lambda x: F.normalize(model.common(F.normalize(compiled(x), dim=1)), dim=1)  # noqa: E731
    cached_step(encode, model.encode_text, images, texts, model.loss, micro_batch=4, check_replay=True)
    assert all(float(g.abs().max()) > 0 for name, g in gradients(model).items() if "weight" in name)


def test_without_micro_batches_it_is_the_plain_step():
    model, (images, texts) = make(dropout=0.4), batch()
    torch.manual_seed(5)
    value, want = by_one_backward(model, images, texts)
    after = torch.rand(3)
    model.image.calls.clear()
    torch.manual_seed(5)
    cached, got = step(model, images, texts, None)
    assert torch.equal(torch.rand(3), after) and len(model.image.calls) == 1
    assert torch.equal(cached, value) and all(torch.equal(got[name], g) for name, g in want.items())


def test_an_empty_batch_is_one_micro_batch():
    model, (images, texts) = make(), batch(0)
    value, got = step(model, images, texts)
    assert float(value) == 0 and all(not g.any() for g in got.values())


def test_gradients_of_the_batch_itself():
    model, (images, texts) = make(), batch()
    by_one_backward(model, images.requires_grad_(), texts)
    want = images.grad.clone()
    images.grad = None
    step(model, images, texts)
    torch.testing.assert_close(images.grad, want)


def shifting(model):
    """An encoder whose forward moves a buffer that it uses."""
    model.register_buffer("shift", torch.zeros(()))

    def encode(x):
        model.shift += 1
        return model.encode_image(x + model.shift)

    return encode


def test_a_pass_that_is_not_the_first_again_is_found():
    model, (images, texts) = make(), batch()
    chance = random.Random(0)
    noisy = lambda x: model.encode_image(x * chance.random())  # noqa: E731
    for encode in (noisy, shifting(model)):
        with pytest.raises(
            ValueError, match=r"encode_image: got features of rows 0 to 3 that differ by 0\.\d+ between"
        ):
            cached_step(encode, model.encode_text, images, texts, model.loss, micro_batch=4, check_replay=True)
        cached_step(encode, model.encode_text, images, texts, model.loss, micro_batch=4)
