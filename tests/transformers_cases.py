"""Tiny models of transformers with random weights, and inputs for them: name -> (model, inputs of a batch)."""

import torch
import torch.distributed as dist
import transformers as tf

from fastvlm_loss.integrations.transformers import patch_transformers

LENGTH, VOCABULARY, SIZE = 6, 40, 8
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = {"image_size": SIZE, "patch_size": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**TOWER, **TOKENS, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
BERT = {**TEXT, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def two_towers(name, text=TEXT, vision=None, **options):
    def config():
        cls = getattr(tf, f"{name}Config")
        return cls(text_config=text, vision_config=vision or {**TOWER, **PICTURE}, **options)

    return config


def dual_encoder():
    vision, text = tf.ViTConfig(**TOWER, **PICTURE), tf.BertConfig(**BERT)
    return tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)


def align():
    vision = {
        "image_size": 16, "hidden_dim": 16, "width_coefficient": 1.0, "depth_coefficient": 1.0, "dropout_rate": 0.0,
        "kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "depthwise_padding": [], "strides": [1],
        "num_block_repeats": [1], "expand_ratios": [1], "drop_connect_rate": 0.0,
    }  # fmt: skip
    return tf.AlignConfig(text_config=BERT, vision_config=vision, projection_dim=16)


def bridgetower():
    wide = {"hidden_size": 64, "num_hidden_layers": 1}  # its vision tower has heads of 64
    text = {**BERT, **wide, "max_position_embeddings": 32, "num_attention_heads": 1}
    return tf.BridgeTowerConfig(
        text_config=text, vision_config={**wide, **PICTURE}, contrastive_hidden_size=16, logit_scale_init_value=2.6592,
        intermediate_size=16, num_attention_heads=1, **wide,
    )  # fmt: skip


def groupvit():
    vision = {
        **TOWER, "image_size": SIZE, "patch_size": 2, "depths": [1, 1], "num_group_tokens": [4, 0],
        "num_output_groups": [4, 0], "num_hidden_layers": 2,
    }  # fmt: skip
    return tf.GroupViTConfig(text_config=TEXT, vision_config=vision, projection_dim=16, projection_intermediate_dim=16)


def clvp():
    encoder = {
        **TOWER, **TOKENS, "hidden_size": 64, "projection_dim": 16, "vocab_size": VOCABULARY, "dropout": 0.0,
        "attention_dropout": 0.0,
    }  # fmt: skip
    decoder = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "max_text_tokens": 64, "hidden_size": 16,
        "n_inner": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_mel_attn_blocks": 1, "feature_size": 8,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, **TOKENS,
        "decoder_fixing_codes": [1, 2, 3, 4],
    }  # fmt: skip
    return tf.ClvpConfig(text_config=encoder, speech_config=encoder, decoder_config=decoder, projection_dim=16)


# class of the model -> what makes its config
MODELS = {
    "AlignModel": align,
    "AltCLIPModel": two_towers("AltCLIP", {**BERT, "project_dim": 16}, projection_dim=16),
    "BlipModel": two_towers("Blip", {**BERT, "encoder_hidden_size": 16}, projection_dim=16),
    "BridgeTowerForContrastiveLearning": bridgetower,
    "CLIPModel": two_towers("CLIP", projection_dim=16),
    "CLIPSegModel": two_towers("CLIPSeg", projection_dim=16),
    "ChineseCLIPModel": two_towers("ChineseCLIP", BERT, projection_dim=16),
    "ClvpModelForConditionalGeneration": clvp,
    "GroupViTModel": groupvit,
    "MetaClip2Model": two_towers("MetaClip2", projection_dim=16),
    "OwlViTModel": two_towers("OwlViT", projection_dim=16),
    "Owlv2Model": two_towers("Owlv2", projection_dim=16),
    "Siglip2Model": two_towers("Siglip2", vision={**TOWER, "patch_size": 4, "num_patches": 4}),
    "SiglipModel": two_towers("Siglip"),
    "Tipsv2Model": two_towers("Tipsv2"),
    "VisionTextDualEncoderModel": dual_encoder,
}


def model(name, seed=0):
    """A model in evaluation mode (no dropout), whose text token 2 ends a text."""
    torch.manual_seed(seed)
    return getattr(tf, name)(MODELS[name]()).eval()


def inputs(name, n=37, seed=1):
    """A batch of n pairs."""
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, LENGTH))
    ids[:, -1] = 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "ClvpModelForConditionalGeneration":
        return {**batch, "input_features": torch.randn(n, 8, 10)}
    if name == "Siglip2Model":
        shapes = torch.full((n, 2), 2)
        return {
            **batch, "pixel_values": torch.randn(n, 4, 48), "spatial_shapes": shapes,
            "pixel_attention_mask": torch.ones(n, 4, dtype=torch.long),
        }  # fmt: skip
    size = 16 if name == "AlignModel" else SIZE
    batch["pixel_values"] = torch.randn(n, 3, size, size)
    if name == "BridgeTowerForContrastiveLearning":
        batch["pixel_mask"] = torch.ones(n, size, size, dtype=torch.long)
    return batch


def step_of_a_group(rank, name, parts, folder):
    """One process with its part of a batch: rank 0 saves the loss and DDP's gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(parts))
    net = model(name)
    patch_transformers(net, group=dist.group.WORLD)
    own = {k: v.split(parts)[rank] for k, v in inputs(name, sum(parts)).items()}
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    loss = parallel(**own, return_loss=True).loss
    loss.backward()
    if rank == 0:
        torch.save((loss.detach(), {k: p.grad for k, p in net.named_parameters()}), f"{folder}/found.pt")
    dist.destroy_process_group()
