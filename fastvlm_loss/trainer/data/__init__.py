"""Pairs to batches: sources by number, an order that the step alone determines, and what a batch holds.

A batch is a dict of CPU tensors, B rows of one process:

    images    uint8 [B, H, W, 3]
    index     int64 [B]; number of the sample, its source's number in the bits from 40 on
    ids       int64 [B]; hash of the caption (in lower case): equal captions have equal ids, >= 0
    captions  list of str
    step      int
    text      tokens int64 [B, T], mask bool [B, T], word int64 [B, T] (number of the word a token belongs to, -1 for
              special tokens), kind uint8 [B, T] (bits OBJECT 1, CONTENT 2, STOP 4, ATTRIBUTE 8), concreteness fp32
              [B, T]
    question  tokens, mask, prompt_lengths int64 [B], answer int64 [B], choice int64 [B] (the answer's place
              among Data.answers, -1 for none), weight fp32 [B] (0: the sample has none); only where questions are
              asked for

A text is ``[CLS] words [SEP]``, a question ``[CLS] question [SEP] answer [SEP]``.
"""

from .batch import Batch, Collator, Row
from .config import DataConfig, SourceConfig
from .loader import Loader
from .opened import Data
from .samples import Sample, Skip, Source
from .words import ATTRIBUTE, CONTENT, OBJECT, STOP, WordKinds

__all__ = [
    "ATTRIBUTE", "CONTENT", "OBJECT", "STOP", "Batch", "Collator", "Data", "DataConfig", "Loader", "Row", "Sample",
    "Skip", "Source", "SourceConfig", "WordKinds",
]  # fmt: skip
