"""Image-text pairs for the demo, the tests and the trainer: shapes (embedded), emoji (fetched), your own files."""

from .pairs import Batch, Pairs, Splits, batches
from .sources import load
from .tokenizer import WordTokenizer

__all__ = ["Batch", "Pairs", "Splits", "WordTokenizer", "batches", "load"]
