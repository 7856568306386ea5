"""What the trainer's model computes: shapes, what sees what, gradients by micro-batches and by recomputation."""

import copy
import functools

import pytest
import torch
from trainer_models import pictures, small, texts

from fastvlm_loss import cached_step, clip_loss
from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, TextConfig, preset
from fastvlm_loss.trainer.model.config import LoraConfig, ModelConfig, Vocabulary
from fastvlm_loss.trainer.model.lengths import GROUPS
from fastvlm_loss.trainer.model.text import visible


@pytest.fixture(scope="module")
def model():
    return small().eval()


def test_shapes_and_dtypes_of_every_part(model):
    tokens, mask = texts([7, 4, 6])
    with torch.autocast("cpu", torch.bfloat16):
        image, text = model("image", pictures(3)), model("text", tokens, mask)
        fused = model("fuse", text["hidden"], mask, image["tokens"])
        match, rows = model("match", fused, image["features"], text["features"]), model("words", fused[mask])
    assert image["tokens"].shape == (3, 17, 32) and text["hidden"].shape == fused.shape == (3, 7, 32)
    for features in (image["features"], text["features"]):
        assert features.shape == (3, 16) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert match.shape == (3, 2) and match.dtype == torch.float32 and rows.shape == (17, 32)
    weight, bias = model("vocabulary")
    assert weight.shape == (50, 32) and bias.shape == (50,)


def test_a_picture_of_48_pixels_has_36_tokens():
    assert ModelConfig() == preset("tiny")
    assert small(ImageConfig(), widths := TextConfig()).image.count == 36 and widths.width == 128


def test_other_texts_and_padding_change_nothing(model):
    tokens, mask = texts([5, 9, 3], total=9)
    together = model("text", tokens, mask)
    for k, length in enumerate((5, 9, 3)):
        alone = model("text", tokens[k : k + 1, :length], mask[k : k + 1, :length])
        torch.testing.assert_close(alone["features"][0], together["features"][k])
        torch.testing.assert_close(alone["hidden"][0], together["hidden"][k, :length])
    image = model("image", pictures(3))
    torch.testing.assert_close(model("image", pictures(3)[1:2])["tokens"][0], image["tokens"][1])


def changed(model, tokens, mask, prefix, place, fuse):
    """Whether each position of the first text feels another token at a place."""
    other = tokens.clone()
    other[0, place] = 5 + (tokens[0, place] - 4) % 45
    image = model("image", pictures(len(tokens)))["tokens"]
    outputs = []
    for given in (tokens, other):
        out = model("text", given, mask, prefix)["hidden"]
        outputs.append(model("fuse", out, mask, image, prefix) if fuse else out)
    return (outputs[0][0] != outputs[1][0]).any(1).tolist()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("prefix", [1, 4, 8, None])
def test_a_position_sees_the_prefix_and_what_is_before_it(model, prefix, fuse):
    tokens, mask = texts([8, 6])
    given = None if prefix is None else torch.tensor([prefix, 2])
    for place in (2, 5, 7):
        seen = [prefix is None or place < prefix or place <= i for i in range(8)]
        assert changed(model, tokens, mask, given, place, fuse) == seen


def test_rows_of_one_call_have_their_own_prefix(model):
    tokens, mask = texts([8, 8, 8])
    mixed = model("text", tokens, mask, torch.tensor([1, 5, 8]))["hidden"]
    for k, prefix in enumerate((1, 5, 8)):
        alone = model("text", tokens[k : k + 1], mask[k : k + 1], torch.tensor([prefix]))["hidden"]
        torch.testing.assert_close(alone[0], mixed[k])


def test_nothing_to_hide_takes_the_path_without_a_mask():
    full = torch.ones(2, 5, dtype=torch.bool)
    assert visible(full, None) is None and visible(full, torch.tensor([5, 9])) is None
    part = full.clone()
    part[1, 3:] = False
    assert visible(part, None).shape == (2, 1, 1, 5)
    assert visible(full, torch.tensor([1, 5]))[0, 0].equal(torch.ones(5, 5, dtype=torch.bool).tril())


def test_fusion_without_the_image_does_not_depend_on_it(model):
    tokens, mask = texts([6, 4])
    hidden, image = model("text", tokens, mask)["hidden"], model("image", pictures(2))["tokens"]
    blind = model("fuse", hidden, mask, None)
    assert not torch.equal(blind, model("fuse", hidden, mask, image))
    assert not torch.equal(model("fuse", hidden, mask, image), model("fuse", hidden, mask, image.flip(0)))
    # what is left is a BERT layer
    hidden = functools.reduce(
        lambda x, layer: layer(x, mask[:, None, None], is_causal=False), model.fusion.layer, hidden
    )
    torch.testing.assert_close(blind, hidden)


def loss_of(model, mask, image, text):
    fused = model("fuse", text["hidden"], mask, image["tokens"])
    scale = model.log_scale.exp()
    return (
        clip_loss(image["features"], text["features"], scale)
        + model("match", fused, image["features"], text["features"]).logsumexp(1).mean()
    )


def gradients(model, micro_batch):
    model.zero_grad()
    tokens, mask = texts([6, 4, 5, 6, 3, 2, 6])
    value = cached_step(
        functools.partial(model, "image"), lambda t: model("text", **t), pictures(7), {"tokens": tokens, "mask": mask},
        functools.partial(loss_of, model, mask), micro_batch=micro_batch, modules=[model],
    )  # fmt: skip
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_have_the_gradient_of_the_batch():
    model = small().double()
    (whole, want), (parts, got) = gradients(model, None), gradients(model, 3)
    torch.testing.assert_close(parts, whole)
    assert got.keys() == want.keys() and len(got) > 60
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12, msg=name)


def test_checkpointing_recomputes_the_same_gradient():
    model = small(text=TextConfig(32, 2, 2, 64, 16, dropout=0.2), fusion=FusionConfig(2, dropout=0.2))
    again = copy.deepcopy(model)
    again.prepare(checkpointing=True)
    made = []
    for m in (model, again):
        torch.manual_seed(3)
        calls = []
        m.text.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        m.image.stages[0].body[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.append((gradients(m, None)[1], len(calls)))
    (want, once), (got, twice) = made
    assert once == GROUPS + 1 and twice == 2 * once, "forward of what is recomputed runs twice"
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_towers_keep_names_and_results(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    # without code generation; an interrupted graph is an error
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count, fullgraph=True))
    model = small().eval()
    names, tokens, mask = [*model.state_dict()], *texts([6, 4])

    def results():
        image, text = model("image", pictures(2)), model("text", tokens, mask)
        return [*image.values(), *text.values(), model("fuse", text["hidden"], mask, image["tokens"])]

    with torch.no_grad():
        want = results()
        model.prepare(compile=["vision", "text", "fusion"])
        torch.testing.assert_close(results(), want)
    assert len(graphs) == 3 and [*model.state_dict()] == names


def test_groups_hold_every_parameter_once():
    model = small(logit_bias=-10.0)
    groups = model.groups()
    assert [*groups] == ["vision", "text", "fusion", "projection", "heads", "scale"]
    flat = [p for parts in groups.values() for m in parts for p in m.parameters()]
    assert len(flat) == len({*flat}) == len([*model.parameters()])


def test_scale_and_bias_are_scalars_with_a_gradient():
    model = small(logit_bias=-10.0)
    assert model.log_scale.item() == pytest.approx(2.65926) and model.logit_bias.item() == -10
    (3 * model.log_scale + 5 * model.logit_bias).backward()
    assert [p.grad.tolist() for m in model.groups()["scale"] for p in m.parameters()] == [[3.0], [5.0]]
    torch.nn.init.constant_(model.log_scale, 1.5)
    assert model.temperature.log_scale.item() == 1.5
    assert small().logit_bias is None


def test_fsdp_can_shard_every_parameter(model):
    assert all(p.is_contiguous() and p.dim() for p in model.parameters())


def test_blocks_are_the_layers(model):
    assert len(model.blocks()) == 3 + 2 + 1 and model.fusion.layer[0] in model.blocks()
    embeddings = model.text.embeddings.word_embeddings.weight
    assert all(p is not embeddings for block in model.blocks() for p in block.parameters())


def test_the_scale_is_clamped_in_place():
    model = small()
    for value, want in ((7.0, 4.60517), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(model.log_scale, value)
        model.clamp_logit_scale()
        assert model.log_scale.item() == pytest.approx(want)


TOKENS, MASK = texts([4, 3])
HIDDEN = torch.zeros(2, 4, 32)
ERRORS = [
    (("picture",), "part: got 'picture', wanted one of 'image', 'text', 'fuse', 'match', 'words', 'answers'"),
    (("image", torch.zeros(2, 32, 31, 3)), r"images: got .*\[2, 32, 31, 3\], wanted shape \[2, 32, 32, 3\]"),
    (("image", torch.zeros(2, 32, 32, 3)), "images: got torch.float32, wanted uint8"),
    (("text", TOKENS.float(), MASK), "tokens: got a float32 .*, wanted an int64"),
    (("text", TOKENS, MASK[:, :3]), r"mask: got .*\[2, 3\], wanted shape \[2, 4\]"),
    (("text", TOKENS, MASK.int()), "mask: got .*, wanted a bool tensor"),
    (("text", TOKENS, MASK, torch.tensor([1])), r"prefix: got .*\[1\], wanted shape \[2\]"),
    (("text", *texts([17])), "tokens: got 17 of a text, wanted at most text.positions = 16"),
    (("fuse", HIDDEN[:, :, :8], MASK, None), "hidden: got .*, wanted width 32"),
    (("fuse", HIDDEN, MASK, HIDDEN[:1]), "image_tokens: got 1 for 2 texts"),
    (("match", HIDDEN[0], HIDDEN[0], HIDDEN[0]), r"fused: got .*, wanted shape \[rows, tokens, D\]"),
    (("words", HIDDEN), r"rows: got .*, wanted shape \[rows, D\]"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[f"{call[0]}-{k}" for k, (call, _) in enumerate(ERRORS)])
def test_errors_of_a_call_are_named(model, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(*call)


CONFIGS = [
    (lambda: ImageConfig(size=50), "image.size: got 50, wanted a multiple of 16"),
    (lambda: ImageConfig("timm"), "image.name: got '', wanted an architecture's name of timm"),
    (lambda: ImageConfig(name="resnet50"), "image.name: got 'resnet50', wanted none for the source 'tiny'"),
    (lambda: ImageConfig(widths=(8, 8)), r"image.widths: got \(8, 8\), wanted four"),
    (lambda: small(ImageConfig("timm", "vit_tiny_patch16_225")), "image.name: got .*near it: vit_tiny_patch16_224"),
    (lambda: small(ImageConfig("timm", "resnet18", options={"no": 1})), "image.options: got .*'no'"),
    (lambda: small(ImageConfig("open_clip", "ViT-B-33")), "image.name: got 'ViT-B-33'.*ViT-B-32"),
    (lambda: small(ImageConfig("open_clip", "ViT-B-32", options={"widht": 1})), "image.options: got 'widht'.*width"),
    (lambda: TextConfig(width=30), "text.heads: got 4, wanted a divisor of text.width = 30"),
    (lambda: TextConfig(dropout=1.0), "text.dropout: got 1.0"),
    (lambda: LoraConfig(r=0), "lora.r: got 0, wanted at least 1"),
    (lambda: small(text=TextConfig(lora=LoraConfig(targets=("quary",)))), "text.lora.targets: got 'quary', .*query"),
    (lambda: Vocabulary(4), "vocabulary.mask_id: got 4, wanted less than the size 4"),
    (lambda: Vocabulary(9, pad_id=3), "vocabulary: got .*, wanted five different tokens"),
    (lambda: preset("large"), "preset: got 'large', wanted 'tiny', 'base' or 'open_clip:NAME'"),
    (lambda: preset("open_clip:ViT-B-33"), "preset: got 'ViT-B-33', .*ViT-B-32"),
    (lambda: small().prepare(compile=["image"]), "compile: got 'image', wanted one of 'vision', 'text', 'fusion'"),
    (lambda: small(fusion=FusionConfig(0))("fuse", HIDDEN, MASK, None), "part: got 'fuse', wanted a model with fusion"),
]


@pytest.mark.parametrize(("make", "message"), CONFIGS, ids=[message.partition(":")[0] for _, message in CONFIGS])
def test_errors_of_a_configuration_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
