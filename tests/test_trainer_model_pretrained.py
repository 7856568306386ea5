"""Weights that others trained: the towers then compute what the others' models compute."""

import dataclasses

import pytest
import torch
from trainer_models import IMAGE, TEXT, WORDS, pictures, small, texts

from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, LoraConfig, TextConfig, VLPretrainModel
from fastvlm_loss.trainer.model.pretrained import load_image_weights, load_text_weights, read

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def bert(folder, kind=transformers.BertModel, layers=3, **more):
    """A BERT of the small model's sizes, saved."""
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, initializer_range=0.2, **more,
    )  # fmt: skip
    model = kind(config).eval()
    model.save_pretrained(folder)
    return model


def test_text_and_fusion_are_the_first_and_last_layers_of_bert(tmp_path):
    other, model = bert(tmp_path), small().eval()
    loaded = load_text_weights(model, tmp_path)
    tokens, mask = texts([7, 4])
    hidden = model("text", tokens, mask)["hidden"]
    want = other(tokens, mask.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[mask], want[2][mask])
    torch.testing.assert_close(model("fuse", hidden, mask, None)[mask], want[3][mask])
    assert loaded.unused == ("pooler.dense.bias", "pooler.dense.weight")
    assert {name.split(".")[0] for name in loaded.new} == {"fusion", "heads"}
    assert all(".crossattention." in name for name in loaded.new if name.startswith("fusion."))


def test_cross_attention_and_prefix_masks_are_those_of_a_bert_decoder(tmp_path):
    other = bert(tmp_path, is_decoder=True, add_cross_attention=True)
    model = small(text=dataclasses.replace(TEXT, layers=0), fusion=FusionConfig(3)).eval()
    assert not [name for name in load_text_weights(model, tmp_path).new if not name.startswith("heads.")]
    (tokens, mask), image, ones = texts([7, 4]), model("image", pictures(2))["tokens"], torch.ones(2).long()
    hidden = model("text", tokens, mask)["hidden"]
    want = other(tokens, mask.long(), encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(model("fuse", hidden, mask, image, ones)[mask], want[mask])


def test_the_head_of_masked_words_comes_along(tmp_path):
    other, model = bert(tmp_path, transformers.BertForMaskedLM), small().eval()
    torch.nn.init.normal_(other.cls.predictions.bias)
    other.save_pretrained(tmp_path)
    load_text_weights(model, tmp_path)
    tokens, mask = texts([6])
    fused = model("fuse", model("text", tokens, mask)["hidden"], mask, None)
    weight, bias = model.vocabulary()
    torch.testing.assert_close(model("words", fused[0]) @ weight.T + bias, other(tokens).logits[0])


def test_adapters_go_beside_loaded_weights(tmp_path):
    other = bert(tmp_path)
    text = dataclasses.replace(TEXT, lora=LoraConfig(2), weights=str(tmp_path))
    model = VLPretrainModel.from_pretrained(dataclasses.replace(small().config, text=text), WORDS).eval()
    tokens, mask = texts([5])
    want = other(tokens, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(model("text", tokens, mask)["hidden"], want)


def test_what_does_not_fit_a_bert_is_named_and_changes_nothing(tmp_path):
    bert(tmp_path)
    for text, message in (
        (dataclasses.replace(TEXT, heads=4), r"config.json: .*num_attention_heads 2 for 4$"),
        (dataclasses.replace(TEXT, layers=3), "missing fusion.layer.0.attention.self.query.weight, "),
    ):
        model = small(text=text)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_text_weights(model, tmp_path)
        assert all(map(torch.equal, before, model.parameters()))
    assert [n for n in load_text_weights(small(fusion=FusionConfig(0)), tmp_path).unused if ".layer.2." in n]
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: not there"):
        load_text_weights(small(), tmp_path / "nowhere")
    safe = read(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**safe, "extra.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"unexpected extra.weight"):
        load_text_weights(small(), tmp_path)
    torch.save({**safe, "embeddings.word_embeddings.weight": torch.ones(60, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"text.embeddings.word_embeddings.weight \[60, 32\] for \[50, 32\]"):
        load_text_weights(small(), tmp_path)


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(size):
    torch.manual_seed(6)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=7, **VIT).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_tower_of_timm(tmp_path, suffix):
    from safetensors.torch import save_file

    other, path = vit(64), tmp_path / f"vit{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": p for n, p in other.state_dict().items()}}, path)
    else:
        save_file(other.state_dict(), path)
    model = small(ImageConfig("timm", "vit_tiny_patch16_224", 64, options=VIT)).eval()
    assert {*load_image_weights(model, path).unused} == {"head.weight", "head.bias"}
    want = other.forward_features((pictures(2, 64).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    tokens, feature = model.image(pictures(2, 64))
    torch.testing.assert_close(tokens, want)
    torch.testing.assert_close(feature, want[:, 0])
    larger = small(ImageConfig("timm", "vit_tiny_patch16_224", 96, options=VIT))
    load_image_weights(larger, path)
    assert larger.image.trunk.pos_embed.shape == (1, 37, 24)
    assert torch.equal(larger.image.trunk.pos_embed[:, 0], other.pos_embed[:, 0])
    with pytest.raises(ValueError, match=r"missing image.trunk.blocks.2.norm1.weight, "):
        load_image_weights(small(ImageConfig("timm", "vit_tiny_patch16_224", 64, options={**VIT, "depth": 3})), path)
    with pytest.raises(ValueError, match=r"missing .*; unexpected .*image.trunk.cls_token"):
        load_image_weights(small(ImageConfig("timm", "resnet18", 64)), path)


def test_a_tower_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    form = {"layers": 2, "width": 32, "head_width": 16}
    torch.manual_seed(7)
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    other = open_clip.CLIP(512, {"image_size": 64, "patch_size": 32, **form}, text).eval()
    torch.save(other.state_dict(), tmp_path / "clip.pt")
    model = small(ImageConfig("open_clip", "ViT-B-32", 64, options=form)).eval()
    unused = load_image_weights(model, tmp_path / "clip.pt").unused
    assert "logit_scale" in unused and not any(name.startswith("visual.") for name in unused)
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    x = ((pictures(2, 64) / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens, feature = model.image(pictures(2, 64))
    assert tokens.shape == (2, 4, 32)
    torch.testing.assert_close(feature, other.visual(x))
    model.prepare(checkpointing=True)
    larger = small(ImageConfig("open_clip", "ViT-B-32", 96, options=form))
    load_image_weights(larger, tmp_path / "clip.pt")
    assert larger.image.count == 9


def test_an_image_tower_starts_from_another_model_of_the_trainer(tmp_path):
    other, model = small(seed=8), small(image=dataclasses.replace(IMAGE, weights=str(tmp_path / "model.safetensors")))
    other.save(tmp_path)
    started = VLPretrainModel.from_pretrained(model.config, WORDS)
    assert all(map(torch.equal, other.image.parameters(), started.image.parameters()))
    assert not torch.equal(other.text_projection.weight, started.text_projection.weight)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.pt: not there, wanted a file of weights"):
        load_image_weights(small(), tmp_path / "no.pt")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=f"{name}: unreadable, wanted safetensors or a state dict"):
            load_image_weights(small(), tmp_path / name)
    torch.save({"model": TextConfig()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code.pt: unreadable"):
        load_image_weights(small(), tmp_path / "code.pt")
    torch.save({"steps": 3}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match=r"number.pt: got dict of more than tensors, wanted a state dict"):
        load_image_weights(small(), tmp_path / "number.pt")
