"""patch_transformers against the models themselves: every covered type, tiny and random, and HF's Trainer."""

import copy
import inspect
import itertools

import accelerate
import pytest
import torch
import transformers as tf
from drop_in_cases import BUDGET, NoMatrix
from torch import nn
from transformers_cases import MODELS, inputs, model, step_of_a_group

from benchmarks.dropin.transformers import run
from fastvlm_loss.integrations import _versions
from fastvlm_loss.integrations.transformers import _COVERED, patch_transformers

tf.logging.set_verbosity_error()
N = 37
LOGITS = {"logits_per_image", "logits_per_text", "logits_per_speech"}


def trained(net, batch):
    """Output and the gradient of every parameter that takes part."""
    net.zero_grad()
    output = net(**batch, return_loss=True)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def off(got, want):
    """The largest difference of a gradient, relative to it, or to a thousandth of the largest where it is rounding."""
    assert got.keys() == want.keys()
    most = max(g.abs().max() for g in want.values())
    return max(
        float((got[k].double() - want[k].double()).abs().max() / max(want[k].abs().max(), 1e-3 * most)) for k in want
    )


def apart(got, want):
    """The distance of two gradients of the whole model, relative to its length."""
    a, b = (torch.cat([g[k].float().flatten() for k in want]) for g in (got, want))
    return float((a - b).norm() / b.norm())


def cast(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def equal(a, b):
    """Whether two nested outputs hold the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_each_covered_model_is_tested():
    assert {name.split(".")[1] for name in _COVERED} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name):
    for dtype in (torch.float32, torch.float64):
        net, batch = model(name).to(dtype), cast(inputs(name, N), dtype)
        want, gradients = trained(net, batch)
        with patch_transformers(net):
            got, ours = trained(net, batch)
        assert got.loss.dtype == dtype
        assert float((got.loss - want.loss).detach().abs()) <= BUDGET[dtype] * float(want.loss.detach())
        assert off(ours, gradients) <= BUDGET[dtype]
        assert type(got) is type(want) and list(got) == [k for k in want if k not in LOGITS]
        assert equal(got.to_tuple()[1:], tuple(v for k, v in zip(want, want.to_tuple(), strict=True) if k in got)[1:])
        scale = "temperature" if name in ("AlignModel", "Tipsv2Model") else "logit_scale"
        assert ours[scale].abs() > 0


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast_it_errs_no_more_than_the_model(name):
    net, batch = model(name), inputs(name, N)
    want, gradients = trained(net, batch)
    with torch.autocast("cpu", torch.bfloat16):
        dense, dense_gradients = trained(net, batch)
        with patch_transformers(net):
            got, ours = trained(net, batch)
    ulp = 2.0**-8
    error = (dense.loss.float() - want.loss).abs()
    assert (got.loss - want.loss).abs() <= 2 * error + 4 * ulp * want.loss
    assert apart(ours, gradients) <= 2 * apart(dense_gradients, gradients) + 4 * ulp


@pytest.mark.parametrize("name", MODELS)
def test_without_a_loss_nothing_changes(name):
    net, batch = model(name), inputs(name, 5)
    with torch.no_grad():
        want, plain = net(**batch), net(**batch, return_dict=False)
        with patch_transformers(net):
            for options in ({}, {"return_loss": False}, {"return_loss": None}):
                assert equal(net(**batch, **options), want)
            assert equal(net(**batch, return_dict=False), plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_tuple_starts_with_the_loss_and_leaves_out_the_logits(name):
    net, batch = model(name), inputs(name, 5)
    with torch.no_grad(), patch_transformers(net):
        want = net(**batch, return_loss=True)
        got = net(**batch, return_loss=True, return_dict=False)
    assert equal(got, want.to_tuple()) and got[0].shape == ()
    assert equal(want["text_embeds"], got[list(want).index("text_embeds")])


def test_a_model_may_be_configured_to_give_tuples():
    net, batch = model("BlipModel"), inputs("BlipModel", 5)
    with torch.no_grad(), patch_transformers(net):
        want = net(**batch, return_loss=True).to_tuple()
        net.config.return_dict = False
        assert equal(net(**batch, return_loss=True)[:3], want[:3])


@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_is_not_made(name):
    n = 1031  # more pairs than a batch has whose products are kept
    net, batch = model(name), inputs(name, n)
    with patch_transformers(net), NoMatrix(n * n, side=n):
        trained(net, batch)
    with pytest.raises(AssertionError, match="mm"), NoMatrix(n * n, side=n), torch.no_grad():
        net(**batch, return_loss=True)


def test_arguments_may_come_by_position():
    net, batch = model("CLIPModel"), inputs("CLIPModel", 5)
    given = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"], None)
    with torch.no_grad(), patch_transformers(net):
        assert equal(net(*given, True), net(**batch, return_loss=True))
        assert net(*given, False).logits_per_text.shape == (5, 5)
        with pytest.raises(TypeError, match="positional"):
            net(*given, True, False, None)


def test_a_loss_of_what_are_no_pairs_is_refused():
    net, batch = model("CLIPModel"), inputs("CLIPModel", 5)
    batch["pixel_values"] = batch["pixel_values"][:3]
    with patch_transformers(net):
        assert net(**batch).logits_per_text.shape == (5, 3)
        with pytest.raises(ValueError, match=r"return_loss: got True for 5 texts beside 3 images, wanted pairs"):
            net(**batch, return_loss=True)


def test_one_side_of_tipsv2_alone_has_no_loss():
    net, batch = model("Tipsv2Model"), inputs("Tipsv2Model", 5)
    del batch["pixel_values"]
    with patch_transformers(net):
        assert net(**batch, return_loss=True).loss is None


def test_the_segmentation_of_groupvit_is_as_it_was():
    net, batch = model("GroupViTModel"), inputs("GroupViTModel", 5)
    options = {"return_loss": True, "output_segmentation": True}
    torch.manual_seed(0)
    want = net(**batch, **options)
    torch.manual_seed(0)
    with patch_transformers(net):
        got = net(**batch, **options)
    assert torch.equal(got.segmentation_logits, want.segmentation_logits)
    assert torch.allclose(got.loss, want.loss, rtol=1e-6)


def has_logits(net):
    with torch.no_grad():
        return net(**inputs("CLIPModel", 3), return_loss=True).logits_per_text is not None


def test_a_model_is_patched_alone_and_a_class_with_all_of_its_instances():
    one, other, original = model("CLIPModel"), model("CLIPModel"), tf.CLIPModel.forward
    with patch_transformers(one):
        assert not has_logits(one) and has_logits(other)
        assert not has_logits(copy.deepcopy(one))
    assert has_logits(one) and "forward" not in vars(one)
    undo = patch_transformers(tf.CLIPModel)
    assert not has_logits(one) and not has_logits(other)
    undo.undo()
    undo.undo()
    assert has_logits(one) and tf.CLIPModel.forward is original


@pytest.mark.parametrize("second", ["class", "model"])
def test_patching_twice_does_no_harm(second):
    net, original = model("CLIPModel"), tf.CLIPModel.forward
    with patch_transformers(tf.CLIPModel):
        with patch_transformers(tf.CLIPModel if second == "class" else net):
            got, _ = trained(net, inputs("CLIPModel", 5))
        assert not has_logits(net)
    want, _ = trained(net, inputs("CLIPModel", 5))
    assert tf.CLIPModel.forward is original and torch.allclose(got.loss, want.loss)


@pytest.mark.parametrize("owner", ["class", "model"])
def test_patches_may_be_undone_in_any_order(owner):
    net, original = model("CLIPModel"), tf.CLIPModel.forward
    for order in itertools.permutations(range(3)):
        patches = [patch_transformers(tf.CLIPModel if owner == "class" else net) for _ in order]
        for k, undone in enumerate(order):
            assert not has_logits(net)
            patches[undone].undo()
            assert has_logits(net) == (k == 2)
        assert tf.CLIPModel.forward is original and "forward" not in vars(net)


def test_a_patch_that_was_undone_is_none():
    net = model("CLIPModel")
    patch = patch_transformers(net)
    with pytest.raises(KeyError), patch:
        raise KeyError
    assert has_logits(net)
    with pytest.raises(RuntimeError, match=r"patch: got one that was undone, wanted a new one"), patch:
        pass


def test_the_signature_stays_which_a_trainer_reads():
    net, original = model("CLIPModel"), inspect.signature(tf.CLIPModel.forward)
    with patch_transformers(net):
        assert list(inspect.signature(net.forward).parameters) == list(original.parameters)[1:]
    with patch_transformers(tf.CLIPModel):
        assert inspect.signature(tf.CLIPModel.forward) == original


@pytest.fixture
def nobody_before():
    """Accelerate as in a new process: its state is one for all, and HF's Trainer sets it."""

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("nobody_before")
def test_accelerate_that_takes_its_wrappers_off_leaves_the_patch():
    net = model("CLIPModel")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with patch_transformers(net):
        prepared = accelerator.prepare_model(net)
        assert not has_logits(prepared)
        assert not has_logits(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))


def test_a_subclass_is_covered_that_leaves_forward_alone():
    class Mine(tf.CLIPModel):
        pass

    class Own(tf.CLIPModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with patch_transformers(Mine):
        assert not has_logits(Mine(MODELS["CLIPModel"]()).eval()) and has_logits(model("CLIPModel"))
    with pytest.raises(TypeError, match=r"got Own \(forward of Own\); wanted one of AlignModel, AltCLIPModel"):
        patch_transformers(Own)
    with patch_transformers(tf.CLIPModel):
        assert not has_logits(Own(MODELS["CLIPModel"]()).eval())


def test_what_is_not_covered_is_refused_by_name():
    with pytest.raises(TypeError, match=r"model_or_class: got Linear .*wanted one of AlignModel, .*VisionTextDual"):
        patch_transformers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got CLIPForImageClassification .*wanted one of"):
        patch_transformers(tf.CLIPForImageClassification)
    with pytest.raises(TypeError, match=r"got str"):
        patch_transformers("openai/clip")
    net = model("CLIPModel")
    net.forward = lambda *args: None
    with pytest.raises(TypeError, match=r"got a CLIPModel whose forward is wrapped already"):
        patch_transformers(net)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ClapModel", "takes the texts' direction twice"),
        ("FlavaForPreTraining", "one of six"),
        ("PeAudioFrameLevelModel", "leave out the negatives"),
        ("PeAudioModel", "leave out the negatives"),
        ("PeAudioVideoModel", "leave out the negatives"),
        ("PeVideoModel", "leave out the negatives"),
        ("VideoPrismClipModel", "a softmax over the batch"),
        ("XCLIPModel", "no product of two matrices"),
    ],
)
def test_models_whose_loss_is_not_matched_are_refused_and_why(name, why):
    with pytest.raises(
        TypeError, match=rf"got {name} \(forward of {name}\), not patched because .*{why}.*wanted one of"
    ):
        patch_transformers(getattr(tf, name))


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(_versions, "version", lambda package: "5.24.0")
    with pytest.raises(ImportError, match=r"transformers: got version 5.24.0, wanted transformers >= 5.23, < 5.24"):
        patch_transformers(tf.CLIPModel)
    assert not hasattr(tf.CLIPModel.forward, "_fastvlm_loss_unpatched")


def test_gradient_checkpointing_gives_the_same_gradients():
    net, batch = model("CLIPModel").train(), inputs("CLIPModel", N)
    _, want = trained(net, batch)
    net.activation_checkpointing_enable()
    with patch_transformers(net):
        _, got = trained(net, batch)
    assert off(got, want) <= BUDGET[torch.float32]


def test_a_whole_step_compiles_and_is_compiled_once():
    net, batch = model("CLIPModel"), inputs("CLIPModel", 8)
    want, gradients = trained(net, batch)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with patch_transformers(net):
        compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
        for _ in range(2):
            net.zero_grad()
            output = compiled(**batch, return_loss=True)
            output.loss.backward()
    got = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    torch._dynamo.reset()
    assert len(graphs) == 1 and output.logits_per_text is None
    assert torch.allclose(output.loss, want.loss, rtol=1e-5) and off(got, gradients) <= BUDGET[torch.float32]


@pytest.mark.parametrize(
    "name",
    [
        "AlignModel",
        "BridgeTowerForContrastiveLearning",
        "CLIPModel",
        "ClvpModelForConditionalGeneration",
        "SiglipModel",
    ],
)
def test_the_group_reaches_the_loss(name):
    net = model(name)
    with patch_transformers(net, group="all"), pytest.raises(TypeError, match=r"group: got str, wanted"):
        net(**inputs(name, 5), return_loss=True)


@pytest.mark.slow  # two processes import transformers
def test_beside_a_group_the_loss_is_that_of_all_its_processes(tmp_path):
    want, gradients = trained(model("SiglipModel"), inputs("SiglipModel", N))
    torch.multiprocessing.spawn(step_of_a_group, ("SiglipModel", (20, 17), str(tmp_path)), nprocs=2)
    loss, got = torch.load(tmp_path / "found.pt")
    assert torch.allclose(loss, want.loss.detach(), rtol=1e-5) and off(got, gradients) <= 2 * BUDGET[torch.float32]


def test_a_run_of_trainer_has_the_same_curve_and_evaluates_to_embeddings(tmp_path):
    given = inputs("CLIPModel", 64)
    given["pixel_values"] += given["input_ids"][:, 0].view(-1, 1, 1, 1) / 10  # something to learn
    want, found = run(model("CLIPModel").train(), given, tmp_path / "plain")
    want_loss, want_sizes = found.metrics["test_loss"], [p.shape for p in found.predictions if hasattr(p, "shape")]
    net = model("CLIPModel").train()
    with patch_transformers(net):
        got, found = run(net, given, tmp_path / "patched")
    loss, sizes = found.metrics["test_loss"], [p.shape for p in found.predictions if hasattr(p, "shape")]
    assert len(got) == len(want) == 20 and want[-1] < 0.9 * want[0]
    # a run carries rounding from step to step
    assert got == pytest.approx(want, rel=1e-3) and loss == pytest.approx(want_loss, rel=1e-3)
    assert want_sizes[:4] == [(64, 16)] * 4 and sizes[:2] == [(64, 16)] * 2 and len(sizes) == len(want_sizes) - 2
