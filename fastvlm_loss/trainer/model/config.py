"""What a model is, as a value: frozen dataclasses of plain types, and presets by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ...scores import check

__all__ = [
    "FusionConfig", "ImageConfig", "LoraConfig", "ModelConfig", "TextConfig", "Tokens", "Vocabulary", "known", "preset",
]  # fmt: skip

SOURCES = ("tiny", "timm", "open_clip")
LOCAL = ("multiscale", "late_interaction")


class Tokens(Protocol):
    """What the model needs to know of a tokenizer: how many tokens there are, and which are no words."""

    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    def __len__(self) -> int: ...


@dataclass
class Vocabulary:
    """`Tokens` as a value; the defaults are those of the built-in word vocabulary.

    Args:
        size: of the vocabulary, special tokens included.
        pad_id, unk_id, cls_id, sep_id, mask_id: different token numbers in [0, size).
    """

    size: int
    pad_id: int = 0
    unk_id: int = 1
    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4

    def __post_init__(self) -> None:
        check.whole("vocabulary.size", self.size, low=1)
        special = {name: value for name, value in vars(self).items() if name != "size"}
        for name, value in special.items():
            if check.whole(f"vocabulary.{name}", value, low=0) >= self.size:
                raise ValueError(f"vocabulary.{name}: got {value}, wanted less than the size {self.size}")
        if len({*special.values()}) < len(special):
            raise ValueError(f"vocabulary: got {special}, wanted five different tokens")

    @classmethod
    def of(cls, tokens: Tokens) -> Vocabulary:
        """That of a tokenizer."""
        return cls(len(tokens), tokens.pad_id, tokens.unk_id, tokens.cls_id, tokens.sep_id, tokens.mask_id)

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights, through peft.

    Args:
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: before the adapter.
        targets: names of the linear layers that get one, for instance `query`, `value`, `dense`.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        check.whole("lora.r", self.r, low=1)
        check.number("lora.alpha", self.alpha, above=0)
        check.number("lora.dropout", self.dropout, low=0, below=1)
        if not self.targets:
            raise ValueError("lora.targets: got none, wanted names of linear layers")


@dataclass(frozen=True)
class ImageConfig:
    """The image tower.

    Args:
        source: `tiny` (convolutions with group normalisation), `timm`, or `open_clip`.
        name: of the architecture at that source; empty for `tiny`.
        size: pixels of a picture's side; a multiple of 16 for `tiny`.
        widths: channels of the four stages of `tiny`, multiples of 8.
        options: further arguments: of `timm.create_model`, or fields of open_clip's vision configuration.
        mean, std: per channel, of pictures in [0, 1]; by default the architecture's.
        weights: a local file, .safetensors or .pt, that training starts from.
    """

    source: Literal["tiny", "timm", "open_clip"] = "tiny"
    name: str = ""
    size: int = 48
    widths: tuple[int, ...] = (48, 96, 128, 192)
    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        check.choice("image.source", self.source, SOURCES)
        check.whole("image.size", self.size, low=1)
        if (self.source == "tiny") != (self.name == ""):
            wanted = "none for the source 'tiny'" if self.name else f"an architecture's name of {self.source}"
            raise ValueError(f"image.name: got {self.name!r}, wanted {wanted}")
        if self.source == "tiny":
            if self.size % 16:
                raise ValueError(f"image.size: got {self.size}, wanted a multiple of 16 for the source 'tiny'")
            if len(self.widths) != 4 or any(check.whole("image.widths", w, low=1) % 8 for w in self.widths):
                raise ValueError(f"image.widths: got {self.widths}, wanted four multiples of 8")
            if self.options:
                raise ValueError(f"image.options: got {sorted(self.options)}, wanted none for the source 'tiny'")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) != 3:
                raise ValueError(f"image.{name}: got {value}, wanted one number a channel")


@dataclass(frozen=True)
class TextConfig:
    """The text tower: BERT's embeddings and first layers.

    Args:
        width: of the hidden states, of the fusion encoder's too.
        layers: transformer layers.
        heads: of the attention; divides `width`.
        inner: width of the feed-forward layers.
        positions: rows of the position table, the longest text.
        dropout: of hidden states and attention.
        init_range: standard deviation of new weights.
        weights: a local folder of a BERT that transformers saved, which training starts from; its first layers become
            the text tower's, the next ones the fusion encoder's.
        lora: adapters; everything else in the tower then stays as it is.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 512
    positions: int = 64
    dropout: float = 0.0
    init_range: float = 0.1
    weights: str | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for name in ("width", "heads", "inner", "positions"):
            check.whole(f"text.{name}", getattr(self, name), low=1)
        check.whole("text.layers", self.layers, low=0)
        check.number("text.dropout", self.dropout, low=0, below=1)
        check.number("text.init_range", self.init_range, above=0)
        if self.width % self.heads:
            raise ValueError(f"text.heads: got {self.heads}, wanted a divisor of text.width = {self.width}")


@dataclass(frozen=True)
class FusionConfig:
    """The fusion encoder: BERT layers with cross-attention to the image, of the text tower's sizes.

    Args:
        layers: 0 for a model that only contrasts.
        dropout: of hidden states and attention.
        lora: adapters; everything else in the encoder then stays as it is.
    """

    layers: int = 2
    dropout: float = 0.0
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check.whole("fusion.layers", self.layers, low=0)
        check.number("fusion.dropout", self.dropout, low=0, below=1)


@dataclass(frozen=True)
class ModelConfig:
    """Towers, fusion encoder and the space of the contrastive features. The defaults are the preset `tiny`.

    Args:
        embed_dim: D of the contrastive features.
        logit_bias: what a trained bias of the scores begins with (the sigmoid loss: -10); None for no such parameter.
        local: heads for objectives of the patches, out of `multiscale` and `late_interaction`.
        answers: what a head for questions chooses from; none: answers are written. The trainer fills it in.
    """

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    embed_dim: int = 128
    logit_bias: float | None = None
    local: tuple[Literal["multiscale", "late_interaction"], ...] = ()
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.local:
            check.choice("local", name, LOCAL)
        for argument, given in (("local", self.local), ("answers", self.answers)):
            if len(set(given)) < len(given):
                raise ValueError(f"{argument}: got {', '.join(given)}, wanted each once")
        check.whole("embed_dim", self.embed_dim, low=1)
        if self.logit_bias is not None:
            check.number("logit_bias", self.logit_bias)


def preset(name: str) -> ModelConfig:
    """A model by name.

    Args:
        name: `tiny` (2.2 M parameters without the vocabulary, for two CPU cores), `base` (ALBEF's sizes: ViT-B/16 at
            256 pixels, 6 + 6 layers of BERT-base), or `open_clip:NAME`, as `base` with open_clip's image tower of that
            name.

    Raises:
        ValueError: no such name; the nearest ones are named.

    Source: Li et al. 2021 (ALBEF), section 3.1.
    """
    if name == "tiny":
        return ModelConfig()
    text = TextConfig(768, 6, 12, 3072, 512, dropout=0.1, init_range=0.02)
    fusion = FusionConfig(6, dropout=0.1)
    if name == "base":
        return ModelConfig(ImageConfig("timm", "vit_base_patch16_224", 256), text, fusion, 256)
    source, _, architecture = name.partition(":")
    if source == "open_clip" and architecture:
        import open_clip

        known("preset", architecture, open_clip.list_models())
        found = open_clip.get_model_config(architecture)
        size = found["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            raise ValueError(f"preset: got {name!r} for pictures of {size} pixels, wanted an architecture for squares")
        return ModelConfig(ImageConfig("open_clip", architecture, size), text, fusion, found["embed_dim"])
    raise ValueError(f"preset: got {name!r}, wanted 'tiny', 'base' or 'open_clip:NAME'")


def known(argument: str, name: str, names: Collection[str]) -> None:
    """Raise unless `name` is among `names`, with its neighbours."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        raise ValueError(f"{argument}: got {name!r}, which there is not; near it: {', '.join(near)}")
