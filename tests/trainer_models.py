"""A model small enough for a test, and inputs for it."""

import torch

from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, ModelConfig, TextConfig, VLPretrainModel, Vocabulary

IMAGE = ImageConfig(size=32, widths=(8, 16, 24, 32))
TEXT = TextConfig(width=32, heads=2, inner=64, positions=16, init_range=0.2)
WORDS = Vocabulary(50)


def small(image=IMAGE, text=TEXT, fusion=FusionConfig(layers=1), embed_dim=16, seed=0, **named):  # noqa: B008
    torch.manual_seed(seed)
    return VLPretrainModel(ModelConfig(image, text, fusion, embed_dim, **named), WORDS)


def pictures(n, size=32, seed=1):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def texts(lengths, total=None, seed=2):
    """Tokens and mask of texts of these lengths."""
    total = total or max(lengths)
    tokens = torch.randint(5, 50, (len(lengths), total), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    tokens[:, 0] = WORDS.cls_id
    return tokens.masked_fill(~mask, WORDS.pad_id), mask
