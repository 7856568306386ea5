"""The text tower and the fusion encoder: layers of transformers' BERT, with the masks of a prefix language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import FusionConfig, LoraConfig, TextConfig, Vocabulary

__all__ = ["Encoder", "FusionEncoder", "TextTower", "VocabularyHead", "add_adapters", "visible"]


def visible(mask: Tensor, prefix: Tensor | None) -> Tensor | None:
    """What each position of a text sees.

    Args:
        mask: bool [B, T], False at padding; the first token is none.
        prefix: int64 [B]: position i sees j if j < prefix or j <= i, so 1 is causal and T everything; None: everything.

    Returns:
        bool [B, 1, T or 1, T]; None if everybody sees everything, which attention is fastest for. That is looked up on
        a CPU alone: a GPU would have to be waited for.
    """
    on_cpu = mask.device.type == "cpu"
    if prefix is None or (on_cpu and bool((prefix >= mask.shape[1]).all())):
        return None if on_cpu and bool(mask.all()) else mask[:, None, None, :]
    i = torch.arange(mask.shape[1], device=mask.device)
    seen = (i < prefix[:, None, None]) | (i <= i[:, None])
    return (seen & mask[:, None, :])[:, None]


class Encoder(nn.Module):
    """BERT layers, by BERT's names."""

    def __init__(self, config: TextConfig, layers: int, dropout: float, cross_attention: bool = False) -> None:
        from transformers.models.bert.modeling_bert import BertLayer

        super().__init__()
        bert = _bert(config, dropout, cross_attention=cross_attention)
        self.layer = nn.ModuleList(BertLayer(bert, layer_idx=k) for k in range(layers))
        _initialise(self, config.init_range)

    def forward(self, hidden: Tensor, seen: Tensor | None) -> Tensor:
        """Hidden states [B, T, W] to the same; `seen` is of `visible`."""
        for layer in self.layer:
            hidden = layer(hidden, seen)
        return hidden

    def set_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward, layer by layer."""
        layers: list[Any] = [*self.layer]
        for layer in layers:
            layer.gradient_checkpointing = enable
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


class FusionEncoder(Encoder):
    """BERT layers with cross-attention to the image, of a text tower's sizes."""

    def __init__(self, text: TextConfig, fusion: FusionConfig) -> None:
        super().__init__(text, fusion.layers, fusion.dropout, cross_attention=True)

    def forward(self, hidden: Tensor, seen: Tensor | None, image_tokens: Tensor | None = None) -> Tensor:
        """Hidden states [n, T, W] beside image tokens [n, P, W] or, with None, without the image."""
        for layer in self.layer:
            # a layer with cross-attention is a decoder to transformers, and causal unless told otherwise
            hidden = layer(hidden, seen, image_tokens, is_causal=False)
        return hidden


class TextTower(nn.Module):
    """BERT's embeddings and layers, by BERT's names."""

    def __init__(self, config: TextConfig, words: Vocabulary) -> None:
        from transformers.models.bert.modeling_bert import BertEmbeddings

        super().__init__()
        self.embeddings = BertEmbeddings(_bert(config, config.dropout, words))
        _initialise(self.embeddings, config.init_range)
        self.encoder = Encoder(config, config.layers, config.dropout)

    def forward(self, tokens: Tensor, mask: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, T] to hidden states [B, T, W]."""
        hidden: Tensor = self.encoder(self.embeddings(tokens), visible(mask, prefix))
        return hidden


class VocabularyHead(nn.Module):
    """BERT's head of masked words, short of the product with the embeddings, to which it is tied."""

    def __init__(self, config: TextConfig, words: Vocabulary) -> None:
        from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

        super().__init__()
        self.transform = BertPredictionHeadTransform(_bert(config, 0.0))
        self.bias = nn.Parameter(torch.zeros(len(words)))
        _initialise(self.transform, config.init_range)

    def forward(self, rows: Tensor) -> Tensor:
        """[r, W] to [r, W]."""
        out: Tensor = self.transform(rows)
        return out


def add_adapters(name: str, module: nn.Module, lora: LoraConfig) -> None:
    """Put adapters into the linear layers that `lora.targets` names; everything else in the module stops learning."""
    import peft

    linear = [path for path, m in module.named_modules() if isinstance(m, nn.Linear)]
    for target in lora.targets:
        if not any(f".{path}".endswith(f".{target}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ValueError(f"{name}.lora.targets: got {target!r}, wanted linear layers among {', '.join(known)}")
    options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[*lora.targets], **options), module)


def _bert(
    config: TextConfig, dropout: float, words: Vocabulary | None = None, cross_attention: bool = False
) -> Any:  # fmt: skip
    from transformers import BertConfig

    bert = BertConfig(
        vocab_size=1 if words is None else len(words),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.inner,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=config.positions,
        initializer_range=config.init_range,
        pad_token_id=0 if words is None else words.pad_id,
        is_decoder=cross_attention,
        add_cross_attention=cross_attention,
    )
    bert._attn_implementation = "sdpa"
    return bert


@torch.no_grad()
def _initialise(module: nn.Module, std: float) -> None:
    """BERT's: normal weights, no bias, a zero row for padding."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            m.weight.normal_(0.0, std)
        if isinstance(m, nn.Linear) and m.bias is not None:
            m.bias.zero_()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None:
            m.weight[m.padding_idx].zero_()
