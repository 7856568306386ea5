"""open_clip's losses replaced by ours: the same loss and the same gradients, in one process and in several."""

import copy
import inspect
import sys
import types

import open_clip
import open_clip.factory
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from drop_in_cases import NoMatrix, run

from fastvlm_loss.integrations import open_clip as ours

theirs = types.SimpleNamespace(**{n: getattr(open_clip.loss, n) for n in ours.__all__ if n.endswith("Loss")})
TENSORS = {
    "ClipLoss": ("image_features", "text_features", "logit_scale"),
    "SigLipLoss": ("image_features", "text_features", "logit_scale", "logit_bias"),
    "CoCaLoss": ("image_features", "text_features", "logits", "labels", "logit_scale"),
    "DistillClipLoss": ("image_features", "text_features", "logit_scale", "dist_image_features", "dist_text_features",
                        "dist_logit_scale"),
}  # fmt: skip
OPTIONS = {"CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.7}}


def inputs(name, n=24, d=16, dtype=torch.float64, scale_shape=()):
    g = torch.Generator().manual_seed(n)

    def unit(width):
        return F.normalize(torch.randn(n, width, generator=g, dtype=torch.float64), dim=1).to(dtype)

    made = {
        "image_features": unit(d), "text_features": unit(d), "dist_image_features": unit(8),
        "dist_text_features": unit(8), "logit_scale": torch.full(scale_shape, 12.0, dtype=dtype),
        "dist_logit_scale": torch.full((), 20.0, dtype=dtype), "logit_bias": torch.full((), -4.0, dtype=dtype),
        "logits": torch.randn(n, 5, 11, generator=g, dtype=torch.float64).to(dtype),
        "labels": torch.randint(11, (n, 5), generator=g),
    }  # fmt: skip
    given = {key: made[key] for key in TENSORS[name]}
    learned = [k for k, v in given.items() if v.is_floating_point() and not k.startswith("dist_")]
    for key in learned:
        given[key].requires_grad_()
    return given, learned


def outcome(loss, given, learned, autocast=None):
    tensors = [given[k] for k in learned]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        found = loss(**given, output_dict=True)
    total = sum(v for v in found.values())
    return {k: v.detach() for k, v in found.items()}, torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("scale_shape", [(), (1,)], ids=["scalar", "[1]"])
@pytest.mark.parametrize("name", TENSORS)
def test_loss_and_gradients_are_those_of_open_clip(name, scale_shape):
    given, learned = inputs(name, scale_shape=scale_shape)
    options = OPTIONS.get(name, {})
    want, want_grads = outcome(getattr(theirs, name)(**options), given, learned)
    got, grads = outcome(getattr(ours, name)(**options), given, learned)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key].reshape(()), want[key].reshape(()), rtol=1e-12, atol=1e-12)
    for key, grad, wanted in zip(learned, grads, want_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", TENSORS)
def test_without_output_dict_as_open_clip(name):
    given, _ = inputs(name)
    options = OPTIONS.get(name, {})
    want, got = (getattr(side, name)(**options)(**given) for side in (theirs, ours))
    assert isinstance(got, tuple) == isinstance(want, tuple)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TENSORS)
def test_under_bf16_autocast_within_twice_the_error_of_open_clip(name):
    given, learned = inputs(name, n=64, dtype=torch.float32)
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}
    for key in learned:
        exact[key].requires_grad_()
    options = OPTIONS.get(name, {})
    truth, *found = (
        outcome(getattr(side, name)(**options), tensors, learned, dtype)
        for side, tensors, dtype in (
            (theirs, exact, None),
            (theirs, given, torch.bfloat16),
            (ours, given, torch.bfloat16),
        )
    )
    for want, dense, got in zip(*([*values.values(), *grads] for values, grads in (truth, *found)), strict=True):
        budget = 2 * (dense - want).norm() + 2**-9 * want.norm()  # and half a unit in the last place
        assert (got - want).norm() <= budget


def test_low_precision_features_and_scale():
    given, learned = inputs("ClipLoss", dtype=torch.bfloat16)
    found, grads = outcome(ours.ClipLoss(), given, learned)
    assert found["contrastive_loss"].dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_an_unused_clip_loss_of_coca_is_zero():
    given, _ = inputs("CoCaLoss")
    options = {"caption_loss_weight": 1.0, "clip_loss_weight": 0}
    want = theirs.CoCaLoss(**options)(**given, output_dict=True)
    got = ours.CoCaLoss(**options)(**given, output_dict=True)
    assert (
        got["contrastive_loss"].item() == want["contrastive_loss"].item() == 0
        and got["contrastive_loss"].dtype == torch.int64
    )


@pytest.mark.parametrize("name", TENSORS)
def test_the_matrix_is_not_made(name):
    n, options = 1500, OPTIONS.get(name, {})
    given, learned = inputs(name, n=n, d=4, dtype=torch.float32)
    with NoMatrix(n * n):
        outcome(getattr(ours, name)(**options), given, learned)
    with pytest.raises(AssertionError, match="returned"), NoMatrix(n * n):
        outcome(getattr(theirs, name)(**options), given, learned)


@pytest.mark.parametrize("name", TENSORS)
def test_constructors_take_what_open_clip_takes(name):
    mine = inspect.signature(getattr(ours, name).__init__).parameters
    for parameter in inspect.signature(getattr(theirs, name).__init__).parameters.values():
        if parameter.name != "self":
            assert mine[parameter.name].default == parameter.default
    newer = {"SigLipLoss": {"chunk_size"}}.get(name, {"use_horovod"})
    assert newer <= mine.keys()
    order = [n for n in inspect.signature(getattr(theirs, name).forward).parameters]
    assert [n for n in inspect.signature(getattr(ours, name).forward).parameters] == order
    assert issubclass(getattr(ours, name), getattr(theirs, name))


def test_horovod_and_a_wrong_world_are_refused():
    with pytest.raises(ValueError, match=r"use_horovod: got True, wanted False"):
        ours.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl: got 'ring', wanted one of 'bidir', 'shift', 'reduce', 'gather'"):
        ours.SigLipLoss(dist_impl="ring")
    given, _ = inputs("ClipLoss")
    with pytest.raises(ValueError, match=r"world_size: got 4, wanted 1"):
        ours.ClipLoss(world_size=4)(**given)


@pytest.mark.parametrize("name", TENSORS)
def test_the_whole_loss_compiles(name):
    given, learned = inputs(name, dtype=torch.float32)
    loss = getattr(ours, name)(**OPTIONS.get(name, {}))
    want, want_grads = outcome(loss, given, learned)
    got, grads = outcome(torch.compile(loss, fullgraph=True, backend="aot_eager"), given, learned)
    torch.testing.assert_close([*got.values(), *grads], [*want.values(), *want_grads])


def test_scaled_gradients_of_a_grad_scaler():
    given, learned = inputs("ClipLoss", dtype=torch.float32)
    tensors = [given[k] for k in learned]
    plain = torch.autograd.grad(ours.ClipLoss()(**given), tensors)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(ours.ClipLoss()(**given)).backward()
    torch.testing.assert_close([g * 2.0**16 for g in plain], [t.grad for t in tensors])


def every_way_to_gather(rank, world):
    """Differences from open_clip in a group, of losses with the share of each process, and of gradients."""
    wrong = []
    ways = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]
    cases = [(name, way) for name in ("ClipLoss", "DistillClipLoss", "CoCaLoss") for way in ways]
    cases += [("SigLipLoss", {"dist_impl": way}) for way in ("bidir", "shift", "reduce", "gather")]
    for name, way in cases:
        given, learned = inputs(name, n=6 * world)
        for key, value in given.items():
            if value.dim() and len(value) == 6 * world:
                given[key] = value.detach().chunk(world)[rank].clone().requires_grad_(value.requires_grad)
        options = {**OPTIONS.get(name, {}), **way, "rank": rank, "world_size": world}
        want, want_grads = outcome(getattr(theirs, name)(**options), given, learned)
        got, grads = outcome(getattr(ours, name)(**options), given, learned)
        for key, value in want.items():
            expected = value.clone()
            if way != {"local_loss": True, "gather_with_grad": False} and key != "caption_loss":
                dist.all_reduce(expected)  # the mean of the processes' shares is the whole batch's
                expected /= world
            if not torch.allclose(got[key], expected, rtol=1e-10, atol=1e-12):
                wrong.append((name, way, key, got[key].item(), expected.item()))
        for key, grad, wanted in zip(learned, grads, want_grads, strict=True):
            if grad.dim() == 0:  # of the scale each process has another share; their mean is what trains
                dist.all_reduce(grad)
                dist.all_reduce(wanted)
            if not torch.allclose(grad, wanted, rtol=1e-9, atol=1e-12):
                wrong.append((name, way, key, (grad - wanted).abs().max().item()))
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_every_way_to_gather_has_the_gradients_of_open_clip(world):
    assert run(world, every_way_to_gather) == [[]] * world


def test_patch_reaches_the_factory_and_is_undone():
    import open_clip_train.main  # what imports open_clip by name

    assert open_clip_train.main
    args = types.SimpleNamespace(
        distill=False, model="ViT-B-32", siglip=False, local_loss=True, gather_with_grad=True, rank=0, world_size=1,
        horovod=False, loss_dist_impl=None, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0,
    )  # fmt: skip
    variants = {"ClipLoss": {}, "CoCaLoss": {"model": "coca_ViT-B-32"}, "SigLipLoss": {"siglip": True},
                "DistillClipLoss": {"distill": True}}  # fmt: skip

    def made():
        found = {}
        for name, change in variants.items():
            asked = copy.copy(args)
            vars(asked).update(change)
            found[name] = type(open_clip.create_loss(asked))
        return found

    originals = {name: getattr(theirs, name) for name in variants}
    assert made() == originals
    with ours.patch_open_clip():
        assert made() == {name: getattr(ours, name) for name in variants}
        assert open_clip.loss.SigLipLoss is ours.SigLipLoss and open_clip.ClipLoss is ours.ClipLoss
        with ours.patch_open_clip():
            pass
        assert open_clip.loss.SigLipLoss is ours.SigLipLoss  # the inner one had nothing to put back
        late = sys.modules["open_clip.late"] = types.ModuleType("open_clip.late")
        late.ClipLoss = open_clip.loss.ClipLoss
    assert made() == originals and late.ClipLoss is theirs.ClipLoss
    del sys.modules["open_clip.late"]
    patch = ours.patch_open_clip()
    assert made()["ClipLoss"] is ours.ClipLoss
    patch.undo()
    patch.undo()
    assert made() == originals
