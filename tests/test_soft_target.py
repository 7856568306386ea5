"""soft_target_clip_loss: published distillations, limits, and the teacher's gradient."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss, soft_target_clip_loss


@pytest.fixture(autouse=True)
def _forced(live_backend):
    with fastvlm_loss.backend(live_backend):
        yield


@pytest.fixture
def teacher(pair):
    tx, ty = (t.detach() for t in pair(40, 16, seed=7))
    return {"teacher_image_features": tx, "teacher_text_features": ty}


def test_equals_open_clips_distillation(pair, teacher):
    open_clip = pytest.importorskip("open_clip")
    x, y = pair(40)
    tx, ty = teacher.values()
    _, distill = open_clip.loss.DistillClipLoss()(x, y, torch.tensor(10.0), tx, ty, torch.tensor(20.0))
    got = soft_target_clip_loss(x, y, 10.0, **teacher, teacher_scale=20.0)
    torch.testing.assert_close(got, distill, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(distill, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_equals_albefs_mix(pair, teacher):
    # targets alpha softmax(sim_m) + (1 - alpha) one-hot, the teacher at the student's temperature
    x, y = pair(40)
    tx, ty = teacher.values()
    s, t = 10.0 * x @ y.T, 10.0 * tx @ ty.T
    want = 0.0
    for z, u in ((s, t), (s.T, t.T)):
        target = 0.4 * u.softmax(1) + 0.6 * torch.eye(40)
        want = want - (F.log_softmax(z, 1) * target).sum(1).mean() / 2
    torch.testing.assert_close(soft_target_clip_loss(x, y, 10.0, **teacher, alpha=0.4), want, rtol=1e-5, atol=1e-5)


def test_the_mix_is_linear_in_alpha(pair, teacher):
    x, y = pair(40)
    hard, soft, mix = (soft_target_clip_loss(x, y, 10.0, **teacher, alpha=a) for a in (0.0, 1.0, 0.3))
    torch.testing.assert_close(hard, clip_loss(x, y, 10.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mix, 0.7 * hard + 0.3 * soft, rtol=1e-5, atol=1e-5)


def test_a_teacher_that_agrees_leaves_its_entropy_and_no_gradient(pair):
    x, y = pair(40)
    own = {"teacher_image_features": x, "teacher_text_features": y}
    loss = soft_target_clip_loss(x, y, 10.0, **own)
    p = (10.0 * x @ y.T).softmax(1), (10.0 * y @ x.T).softmax(1)
    want = sum(-(q * q.log()).sum(1).mean() for q in p) / 2
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert gradient.abs().max() < 1e-5


def test_a_certain_teacher_is_hard_and_an_ignorant_one_smooths(pair):
    x, y = pair(40)
    eye = {"teacher_image_features": torch.eye(40), "teacher_text_features": torch.eye(40)}
    certain = soft_target_clip_loss(x, y, 10.0, **eye, teacher_scale=1e3)
    torch.testing.assert_close(certain, clip_loss(x, y, 10.0), rtol=1e-5, atol=1e-5)
    ignorant = soft_target_clip_loss(x, y, 10.0, **eye, teacher_scale=1e-9)
    s = 10.0 * x @ y.T
    want = (s.logsumexp(1).mean() + s.logsumexp(0).mean()) / 2 - s.mean()
    torch.testing.assert_close(ignorant, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_teacher(pair, teacher):
    # dL/dt = -Q (z - E_Q z) / M
    x, y = pair(40)
    tx, ty = (t.requires_grad_() for t in teacher.values())
    scale = torch.tensor(20.0, requires_grad=True)
    given = {"teacher_image_features": tx, "teacher_text_features": ty, "teacher_scale": scale}
    loss = soft_target_clip_loss(x, y, 10.0, -1.0, **given, teacher_grad=True, directions="image")
    got = torch.autograd.grad(loss, (tx, ty, scale))
    s, c = (10.0 * x @ y.T).detach(), (tx @ ty.T).detach()
    q = (20.0 * c).softmax(1)
    dt = -q * (s - (q * s).sum(1, keepdim=True)) / 40
    for a, b in zip(got, (20.0 * dt @ ty, 20.0 * dt.T @ tx, (dt * c).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_detached_unless_asked(pair, teacher):
    x, y = pair(40)
    tx = teacher["teacher_image_features"].requires_grad_()
    loss = soft_target_clip_loss(x, y, 10.0, **teacher)
    assert torch.autograd.grad(loss, tx, allow_unused=True)[0] is None


def test_errors_name_the_teacher(pair, teacher):
    x, y = pair(40)
    ty = teacher["teacher_text_features"]
    for change, message in (
        ({"teacher_text_features": ty[:7]}, "teacher_text_features: got .*7, 16.*wanted 40 rows"),
        ({"teacher_text_features": ty[:, :3]}, r"teacher_text_features: got .*\[40, 3\], wanted D = 16"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"teacher_scale": -1.0}, "teacher_scale: got -1.0"),
        ({"filters": fastvlm_loss.filters.guide(x, y)}, "one second score matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_target_clip_loss(x, y, 10.0, **{**teacher, **change})
    with pytest.raises(TypeError, match="label_smoothing: got an option that this loss does not have"):
        soft_target_clip_loss(x, y, 10.0, **teacher, label_smoothing=0.1)
