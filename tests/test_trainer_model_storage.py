"""The trainer's model on disk: bit for bit, ties, adapters, sizes of the presets."""

import dataclasses
import json

import pytest
import torch
from trainer_models import TEXT, WORDS, pictures, small, texts

from fastvlm_loss import linear_cross_entropy
from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, LoraConfig, VLPretrainModel, preset
from fastvlm_loss.trainer.model.config import ModelConfig, Vocabulary
from fastvlm_loss.trainer.model.storage import plain

LORA = LoraConfig(r=2, dropout=0.1, targets=("query", "value", "intermediate.dense"))


def outputs(model):
    model.eval()
    tokens, mask = texts([6, 4])
    image, text = model("image", pictures(2)), model("text", tokens, mask)
    fused = model("fuse", text["hidden"], mask, image["tokens"])
    return [
        *image.values(),
        *text.values(),
        model("match", fused, image["features"], text["features"]),
        model("words", fused[mask]),
        *model.vocabulary(),
    ]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def adapted(seed=0):
    """A model with adapters that change something."""
    model = small(text=dataclasses.replace(TEXT, lora=LORA), fusion=FusionConfig(1, lora=LORA), seed=seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("make", [small, adapted], ids=["plain", "adapters"])
def test_saving_and_loading_is_exact(make, tmp_path):
    model = make(seed=5)
    torch.nn.init.constant_(model.log_scale, 3.25)
    model.save(tmp_path / "new" / "folder")
    again = VLPretrainModel.load(tmp_path / "new" / "folder")
    assert again.config == model.config and again.words == model.words
    before, after = model.state_dict(), again.state_dict()
    assert [*before] == [*after] and same([*before.values()], [*after.values()])
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert same(outputs(model), outputs(again))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_the_vocabulary_is_one_parameter_before_and_after(tmp_path):
    model = small()
    model.save(tmp_path)
    for m in (model, VLPretrainModel.load(tmp_path)):
        weight, _ = m.vocabulary()
        assert weight is m.text.embeddings.word_embeddings.weight
        assert sum(p.shape == (50, 32) for p in m.parameters()) == 1
        # embedding and product both leave their gradient there: token 7 is read, token 9 only predicted
        tokens = torch.full((1, 3), 7)
        hidden = m("text", tokens, torch.ones(1, 3, dtype=torch.bool))["hidden"][0]
        linear_cross_entropy(m("words", hidden), weight, torch.tensor([9, 9, 9])).backward()
        parts = weight.grad.norm(dim=1)
        assert parts[7] > 0 and parts[9] > 0 and m("vocabulary")[0] is weight


def test_names_are_plain_however_the_model_is_wrapped(tmp_path):
    model = small()
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    model.save(tmp_path, wrapped)
    assert same([*VLPretrainModel.load(tmp_path).state_dict().values()], [*model.state_dict().values()])
    names = [plain(name) for name in adapted().state_dict()]
    assert len({*names}) == len(names) and not any("base_layer" in name for name in names)
    assert {*map(plain, model.state_dict())} == {name for name in names if "lora_" not in name}


def test_adapters_learn_and_nothing_beside_them():
    model = adapted()
    fixed = model.fixed()
    towers = [*model.text.parameters(), *model.fusion.parameters()]
    assert {p for p in towers if not p.requires_grad} == fixed and 0 < len(fixed) < len(towers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sum(out.float().square().sum() for out in outputs(model)).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    inside = {name for name in moved if name.startswith(("text.", "fusion."))}
    # of the layers of text and fusion: queries, values (of cross-attention too) and feed-forward
    assert inside == {name for name, _ in model.named_parameters() if "lora_" in name} and len(inside) == 22
    assert small().fixed() == set()


def test_adapters_beside_saved_weights_start_without_effect(tmp_path):
    model = small()
    model.save(tmp_path)
    config = dataclasses.replace(model.config, text=dataclasses.replace(TEXT, lora=LORA))
    again = VLPretrainModel.load(tmp_path, config)
    assert any("lora_" in name for name in again.state_dict()) and same(outputs(model), outputs(again))


def broken(folder, kind):
    path = folder / "model.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "missing":
        path.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    else:
        found = json.loads((folder / "config.json").read_text())
        found["model"]["embed_dim"] = 8
        (folder / "config.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated", ValueError, "model.safetensors: damaged, wanted safetensors"),
        ("missing", FileNotFoundError, "model.safetensors: not there"),
        ("no config", FileNotFoundError, "config.json: not there"),
        ("mixed", ValueError, "config.json: not of the same save as model.safetensors"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, kind, error, message):
    small().save(tmp_path)
    broken(tmp_path, kind)
    with pytest.raises(error, match=message):
        VLPretrainModel.load(tmp_path)


def test_other_sizes_are_named(tmp_path):
    model = small()
    model.save(tmp_path)
    wider = dataclasses.replace(model.config, embed_dim=8)
    with pytest.raises(ValueError, match=r"image_projection.weight \[16, 128\] for \[8, 128\]; .*text_projection"):
        VLPretrainModel.load(tmp_path, wider)
    deeper = dataclasses.replace(model.config, fusion=FusionConfig(2))
    with pytest.raises(ValueError, match=r"missing fusion.layer.1.attention.self.query.weight, .*crossattention"):
        VLPretrainModel.load(tmp_path, deeper)
    with pytest.raises(ValueError, match=r"unexpected temperature.bias"):
        model.save(tmp_path, {**model.state_dict(), "temperature.bias": torch.zeros(1)})


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_the_base_preset_has_albefs_sizes():
    with torch.device("meta"):
        model = VLPretrainModel(preset("base"), Vocabulary(30522))
    w, norm = 768, 2 * 768
    attention = 4 * linear(w, w) + norm
    layer = attention + linear(w, 4 * w) + linear(4 * w, w) + norm
    vit = linear(3 * 16 * 16, w) + w + 257 * w + 12 * layer + norm  # a layer's two norms are as BERT's
    text = (30522 + 512 + 2) * w + norm + 6 * layer
    fusion = 6 * (layer + attention) + linear(w, w) + norm  # and the summary of the picture
    heads = linear(w, 256) + linear(4 * 256, 256) + linear(256, 2) + linear(w, w) + norm + 30522
    sizes = {n: sum(p.numel() for m in parts for p in m.parameters()) for n, parts in model.groups().items()}
    want = {"vision": vit, "text": text, "fusion": fusion, "projection": 2 * linear(w, 256), "heads": heads, "scale": 1}
    assert sizes == want and (model.image.count, model.image.token_width) == (257, 768)
    assert sum(p.numel() for p in model.parameters()) == sum(want.values())


@pytest.mark.parametrize(
    ("name", "count", "width"), [("ViT-B-32", 49, 768), ("RN50", 49, 2048), ("ViT-B-16-SigLIP", 196, 768)]
)
def test_a_preset_takes_an_image_tower_of_open_clip(name, count, width):
    with torch.device("meta"):
        model = VLPretrainModel(preset(f"open_clip:{name}"), Vocabulary(30522))
    assert (model.image.count, model.image.token_width) == (count, width) and model.config.text.layers == 6
    assert isinstance(model.bridge, torch.nn.Identity) == (width == 768)


def test_a_convolutional_tower_of_timm_gives_its_last_map():
    model = VLPretrainModel(ModelConfig(ImageConfig("timm", "resnet18", 64), TEXT, FusionConfig(1), 16), WORDS)
    out = model.eval()("image", pictures(2, 64))
    assert out["tokens"].shape == (2, 5, 32) and out["features"].shape == (2, 16)
    x = model.image.trunk.forward_features(model.image.normalise(pictures(2, 64)))
    torch.testing.assert_close(model.bridge(x.flatten(2).transpose(1, 2)), out["tokens"][:, 1:])
