"""VLPretrainModel: an image tower, a text tower, a fusion encoder, and the heads of the objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ...heads import MatchingHead
from ...scores import check
from .config import LOCAL, ModelConfig, Tokens, Vocabulary
from .image import ImageTower, image_tower
from .lengths import by_length
from .local import LateInteraction, local_heads
from .text import Encoder, FusionEncoder, TextTower, VocabularyHead, add_adapters, visible

__all__ = ["PARTS", "VLPretrainModel"]

PARTS = ("image", "text", "fuse", "match", "words", "answers", "vocabulary", *LOCAL)
MAX_LOG_SCALE = math.log(100)


class Temperature(nn.Module):
    """The scale and the bias of the scores. Of shape [1], because FSDP shards no scalars."""

    bias: nn.Parameter | None

    def __init__(self, bias: float | None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.tensor([float(bias)])))


class Match(nn.Module):
    """A `MatchingHead` on the contrastive features of a pair, the text's corrected by what fusion makes of its token.

    So matching begins with what contrast knows, and fusion has only the rest to learn.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.size = math.sqrt(dim)  # of features with entries of about 1
        self.correct = nn.Linear(width, dim)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)
        self.head = MatchingHead(dim)

    def forward(self, fused: Tensor, image_features: Tensor, text_features: Tensor) -> Tensor:
        """The fused first token [n, W] and features of length one [n, D] to logits [n, 2]."""
        logits: Tensor = self.head(self.size * image_features, self.size * text_features + self.correct(fused))
        return logits


class Answers(nn.Sequential):
    """A logit for each answer, at first as likely as one of all.

    Source: Tan and Bansal 2019 (LXMERT), whose head for VQA has these layers.
    """

    def __init__(self, width: int, count: int) -> None:
        outer = nn.Linear(2 * width, count)
        nn.init.constant_(outer.bias, -math.log(count))
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), outer)


class VLPretrainModel(nn.Module):
    """Every call is `model(part, ...)`, because the hooks of DDP and FSDP hang on `forward`:

    - `model("image", images uint8 [B, H, W, 3])` gives `features` fp32 [B, D] of length one and `tokens` [B, P, W], of
      which the first is the whole picture's and the others are the tower's;
    - `model("text", tokens int64 [B, T], mask bool [B, T], prefix=None)` gives `features` fp32 [B, D] of length one, of
      the first token, and `hidden` [B, T, W]. `prefix` int64 [B] makes it a prefix language model: position i sees j if
      j < prefix or j <= i (1: causal; T: everything; None: everything, in every row);
    - `model("fuse", hidden [n, T, W], mask, image_tokens [n, P, W], prefix=None)` gives [n, T, W] by cross-attention to
      the image; `image_tokens=None` leaves that out;
    - `model("match", fused [n, T, W], image_features [n, D], text_features [n, D])` gives logits fp32 [n, 2], class 1
      a match;
    - `model("words", rows [r, W])` gives [r, W], the rows that `linear_cross_entropy` compares with the vocabulary;
    - `model("answers", fused [n, T, W])` gives logits fp32 [n, A] of the config's answers, from the first token;
    - `model("multiscale", image_tokens)` gives `patches` fp32 [B, P, D] of length one, and `scale` and `bias` [1], and
      `model("late_interaction", image_tokens, hidden)` gives `patches` and `words` fp32 [B, T, D] of length one, and
      `scale` [1], for models whose config's `local` names them;
    - `model("vocabulary")` or `model.vocabulary()` gives its weight [V, W], tied to the embeddings, and bias [V].

    Parameters are fp32; call it under autocast for bf16 products. The features are made and normalised in fp32.

    Args:
        config: sizes and architectures.
        tokens: a tokenizer, or the `Vocabulary` of one: how many tokens there are, and which is padding.

    Raises:
        TypeError, ValueError: an argument, here or in a call, of the wrong kind, shape or dtype, named.

    Source: Li et al. 2021 (ALBEF), section 3; the prefix masks of Wang et al. 2022 (SimVLM).
    """

    def __init__(self, config: ModelConfig, tokens: Tokens) -> None:
        super().__init__()
        self.config, self.words = config, Vocabulary.of(tokens)
        width = config.text.width
        self.image = image_tower(config.image)
        self.text = TextTower(config.text, self.words)
        self.fusion = FusionEncoder(config.text, config.fusion)
        alike = self.image.token_width == width
        self.bridge = nn.Identity() if alike else nn.Linear(self.image.token_width, width)
        self.image_projection = nn.Linear(self.image.feature_width, config.embed_dim)
        self.text_projection = nn.Linear(width, config.embed_dim)
        self.summary = nn.Sequential(nn.Linear(self.image.feature_width, width), nn.LayerNorm(width))
        self.heads = nn.ModuleDict(
            {"match": Match(width, config.embed_dim), "words": VocabularyHead(config.text, self.words)}
        )
        if config.answers:
            self.heads["answers"] = Answers(width, len(config.answers))
        self.heads.update(local_heads(config.local, width, config.embed_dim))
        self.temperature = Temperature(config.logit_bias)
        for name, lora in (("text", config.text.lora), ("fusion", config.fusion.lora)):
            if lora is not None:
                add_adapters(name, getattr(self, name), lora)

    @classmethod
    def from_pretrained(cls, config: ModelConfig, tokens: Tokens) -> VLPretrainModel:
        """A model whose towers start from the local files that `image.weights` and `text.weights` name, if they do.

        Raises:
            ValueError: see `pretrained.load_image_weights` and `pretrained.load_text_weights`.
        """
        from .pretrained import load_image_weights, load_text_weights

        model = cls(config, tokens)
        if config.image.weights is not None:
            load_image_weights(model, config.image.weights)
        if config.text.weights is not None:
            load_text_weights(model, config.text.weights)
        return model

    def forward(self, part: str, *inputs: Any, **named: Any) -> Any:
        """One of `PARTS`; see the class."""
        return getattr(self, f"_{check.choice('part', part, PARTS)}")(*inputs, **named)

    def _image(self, images: Tensor) -> dict[str, Tensor]:
        size = self.config.image.size
        shape = torch.Size([images.shape[0] if isinstance(images, Tensor) and images.dim() else 0, size, size, 3])
        check.shaped("images", images, shape)
        if images.dtype != torch.uint8:
            raise TypeError(f"images: got {images.dtype}, wanted uint8")
        tokens, pooled = self.image(images)
        tokens = torch.cat([self.summary(pooled)[:, None], self.bridge(tokens)], 1)
        return {"features": self._features(self.image_projection, pooled), "tokens": tokens}

    def _text(self, tokens: Tensor, mask: Tensor, prefix: Tensor | None = None) -> dict[str, Tensor]:
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise TypeError(f"tokens: got {check._got(tokens)}, wanted an int64 tensor of shape [B, T]")
        if tokens.shape[1] > self.config.text.positions:
            raise ValueError(
                f"tokens: got {tokens.shape[1]} of a text, wanted at most text.positions = {self.config.text.positions}"
            )
        mask, prefix = self._masks(mask, prefix, tokens)
        hidden = self._in_groups(lambda m, t, p: self.text(t, m, p), mask, (tokens,), (prefix,))
        return {"features": self._features(self.text_projection, hidden[:, 0]), "hidden": hidden}

    def _fuse(
        self, hidden: Tensor, mask: Tensor, image_tokens: Tensor | None, prefix: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        if not self.config.fusion.layers:
            raise ValueError("part: got 'fuse', wanted a model with fusion.layers >= 1")
        for name, value in (("hidden", hidden), ("image_tokens", image_tokens)):
            if value is not None:
                self._wide(name, value)
        if image_tokens is not None and image_tokens.shape[0] != hidden.shape[0]:
            raise ValueError(f"image_tokens: got {image_tokens.shape[0]} for {hidden.shape[0]} texts, wanted as many")
        mask, prefix = self._masks(mask, prefix, hidden)
        return self._in_groups(
            lambda m, h, p, seen: self.fusion(h, visible(m, p), seen), mask, (hidden,), (prefix, image_tokens)
        )

    def _in_groups(
        self, run: Callable[..., Tensor], mask: Tensor, texts: tuple[Tensor, ...], others: tuple[Tensor | None, ...]
    ) -> Tensor:  # fmt: skip
        # FSDP gathers a block for each call, and all processes must gather equally often
        sharded = any(isinstance(block, FSDPModule) for block in self.blocks())
        return run(mask, *texts, *others) if sharded else by_length(run, mask, texts, others)

    def _match(self, fused: Tensor, image_features: Tensor, text_features: Tensor) -> Tensor:
        pair = check.features("image_features", image_features), check.features("text_features", text_features)
        return self._exact(self.heads["match"], check.sets("fused", fused)[:, 0], *pair)

    def _answers(self, fused: Tensor) -> Tensor:
        if not self.config.answers:
            raise ValueError("part: got 'answers', wanted a model with answers to choose from")
        return self._exact(self.heads["answers"], check.sets("fused", fused)[:, 0])

    def _multiscale(self, image_tokens: Tensor) -> dict[str, Tensor]:
        head = self._local("multiscale", image_tokens=image_tokens)
        # new tensors, since FSDP takes the parameters' memory back
        scalars = {"scale": 1.0 * head.scale, "bias": 1.0 * head.bias}
        return {"patches": self._features(head.patches, image_tokens), **scalars}

    def _late_interaction(self, image_tokens: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        head = self._local("late_interaction", image_tokens=image_tokens, hidden=hidden)
        patches, words = self._features(head.patches, image_tokens), self._features(head.words, hidden)
        return {"patches": patches, "words": words, "scale": head.log_scale.exp()}

    def _local(self, name: str, **sets: Tensor) -> Any:
        """The head of this name, after a look at what it is given."""
        if name not in self.config.local:
            raise ValueError(f"part: got {name!r}, wanted a model with {name} in local")
        for argument, given in sets.items():
            self._wide(argument, given)
        return self.heads[name]

    def _wide(self, name: str, given: Tensor) -> None:
        if check.sets(name, given).shape[2] != self.config.text.width:
            raise ValueError(f"{name}: got {check._got(given)}, wanted width {self.config.text.width}")

    def _words(self, rows: Tensor) -> Tensor:
        out: Tensor = self.heads["words"](check.features("rows", rows))
        return out

    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.text.embeddings.word_embeddings.weight
        return weight, cast(VocabularyHead, self.heads["words"]).bias

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        """Weight [V, W], the embeddings themselves, and bias [V] of the vocabulary."""
        return self._vocabulary()

    @staticmethod
    def _masks(mask: Tensor, prefix: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = check.mask("mask", mask, like.shape[:2], like)
        return mask, None if prefix is None else check.integers("prefix", prefix, like.shape[0], like)

    def _features(self, project: nn.Module, pooled: Tensor) -> Tensor:
        return F.normalize(self._exact(project, pooled), dim=-1)

    @staticmethod
    def _exact(head: nn.Module, *rows: Tensor) -> Tensor:
        """A small product in fp32, autocast or not: bf16 features would move a logit by 0.05 at a scale of 100."""
        dtype = next(head.parameters()).dtype
        with torch.autocast(rows[0].device.type, enabled=False):
            out: Tensor = head(*(r.to(dtype) for r in rows))
        return out

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the scores' scale, `[]`, a view of the parameter; at first ln(1 / 0.07)."""
        return _scalar(self.temperature.log_scale)

    @property
    def logit_bias(self) -> Tensor | None:
        """The scores' bias, `[]`, a view of the parameter, or None."""
        bias = self.temperature.bias
        return None if bias is None else _scalar(bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale in [1, 100]; called after each step, since a clamp in forward would stop the gradient."""
        self.temperature.log_scale.clamp_(0, MAX_LOG_SCALE)
        if "late_interaction" in self.config.local:
            cast(LateInteraction, self.heads["late_interaction"]).log_scale.clamp_(0, MAX_LOG_SCALE)

    def groups(self) -> dict[str, list[nn.Module]]:
        """Modules by the names that stages freeze by; together every parameter, each once."""
        return {
            "vision": [self.image],
            "text": [self.text],
            "fusion": [self.fusion, self.bridge, self.summary],
            "projection": [self.image_projection, self.text_projection],
            "heads": [*self.heads.values()],
            "scale": [self.temperature],
        }

    def fixed(self) -> set[nn.Parameter]:
        """Parameters that no stage may train: those beside adapters."""
        towers = ((self.text, self.config.text.lora), (self.fusion, self.config.fusion.lora))
        with_adapters = [tower for tower, lora in towers if lora is not None]
        return {p for tower in with_adapters for name, p in tower.named_parameters() if "lora_" not in name}

    def blocks(self) -> list[nn.Module]:
        """The parts that FSDP gathers one at a time; the embeddings are in none, since `vocabulary` needs them."""
        return [*self.image.blocks(), *self.text.encoder.layer, *self.fusion.layer]

    def prepare(
        self, checkpointing: bool | Collection[str] = False, compile: bool | Collection[str] = False
    ) -> None:  # fmt: skip
        """Settle how the towers run; parameters and their names stay as they are.

        Args:
            checkpointing: recompute activations in backward instead of keeping them: in all towers, or in those named
                (`vision`, `text`, `fusion`).
            compile: `torch.compile`, likewise.

        Raises:
            ValueError: a tower that there is not, or that cannot do it, named.
        """
        towers: dict[str, ImageTower | Encoder] = {
            "vision": self.image, "text": self.text.encoder, "fusion": self.fusion
        }  # fmt: skip
        for name in self._named("checkpointing", checkpointing, towers):
            towers[name].set_checkpointing(True)
        for name in self._named("compile", compile, towers):
            towers[name].compile()

    @staticmethod
    def _named(argument: str, value: bool | Collection[str], towers: Collection[str]) -> list[str]:
        if isinstance(value, bool):
            return [*towers] if value else []
        return [check.choice(argument, name, tuple(towers)) for name in value]

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `model.safetensors` and `config.json`; `state`: the gathered state dict of a sharded model."""
        from .storage import save

        save(self, Path(folder), self.state_dict() if state is None else state)

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig | None = None) -> VLPretrainModel:
        """The model that `save` wrote, on the CPU; with a `config` of other adapters, those start anew.

        Raises:
            FileNotFoundError, ValueError: a file that is missing, damaged, or of another model; see `storage.load`.
        """
        from .storage import load

        return load(Path(folder), config)


def _scalar(parameter: Tensor) -> Tensor:
    """[1] as [], gathered where it is in shards."""
    whole: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.reshape(())
