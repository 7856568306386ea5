"""A short run of `SentenceTransformerTrainer` on a tiny model of a config and a tokenizer of words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fastvlm_loss.integrations import sentence_transformers as replaced

__all__ = ["curve", "texts", "tiny_model", "trained"]

NOUNS = ["cat", "dog", "tree", "car", "house", "river", "stone", "cloud", "bird", "lamp"]
WORDS = [*NOUNS, *(f"a{i}" for i in range(6)), *(f"b{i}" for i in range(6)), *(f"c{i}" for i in range(6))]


def tiny_model(folder: Path, seed: int = 0) -> SentenceTransformer:
    """A BERT of one layer, saved in a folder and read from there as any model."""
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = Transformer(str(folder), max_seq_length=12)
    return SentenceTransformer(modules=[encoder, Pooling(24)], device="cpu")


def texts(rows: int, seed: int = 0) -> Dataset:
    """Queries, their documents and hard negatives, which share all but the noun."""
    draw = random.Random(seed)
    found = {"anchor": [], "positive": [], "negative": []}
    for _ in range(rows):
        noun, other = draw.sample(NOUNS, 2)
        a, b, c = (f"{k}{draw.randrange(6)}" for k in "abc")
        found["anchor"].append(f"{a} {noun} {b}")
        found["positive"].append(f"{a} {noun} {c}")
        found["negative"].append(f"{b} {other} {c}")
    return Dataset.from_dict(found)


def trained(kind: Any, options: dict[str, Any], folder: Path) -> list[float]:
    """The losses of 16 steps of the package's own trainer, one seed."""
    model = tiny_model(folder / "model").double()  # in which training magnifies no rounding
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=12, max_steps=16, learning_rate=5e-3, seed=1,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=texts(192), loss=kind(model, **options)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def curve(kind: str, ours: bool, folder: Path) -> list[float]:
    """The loss of every step, of the loss of that name."""
    return trained(getattr(replaced if ours else theirs, kind), {}, folder)
