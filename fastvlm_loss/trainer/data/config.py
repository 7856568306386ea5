"""Which pairs a run is trained on, and how they become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...data.images import MAX_PIXELS

__all__ = ["DataConfig", "SourceConfig"]


@dataclass(frozen=True)
class SourceConfig:
    """One source of pairs.

    Args:
        path: `shapes` (embedded), `emoji` (fetched once), a folder of pictures with a .txt beside each, a .csv or .tsv
            table, or webdataset shards: a folder of .tar, a glob, or `path/{000..123}.tar`.
        weight: its share of the batches is this over the sum of all weights.
        evaluation: another path with the pairs to evaluate on; by default one caption in ten is held out.
        level: of `shapes`: 1 one object, 2 two, 3 two and their relation, None a mixture.
        samples: of `shapes`: training pairs.
        separator: of a table; by default a tab where its first line has one, else a comma.
        image_column: of a table; by default one of image, path, filepath, file, filename, image_path.
        caption_column: of a table; by default one of caption, text, title, description.
    """

    path: str = "shapes"
    weight: float = 1.0
    evaluation: str | None = None
    level: Literal[1, 2, 3] | None = None
    samples: int = 40_000
    separator: str | None = None
    image_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """All sources, and what is done to their samples.

    Args:
        sources: one or several.
        mix: of several sources: `sample` puts rows of all into each batch, in exact proportion; `batch` draws the
            source of each whole batch, so that its negatives are of one kind.
        size: of the pictures, pixels a side.
        max_pixels: a picture with more is skipped, before it is decoded.
        augment: zoom, shift, tilt and recolour training pictures a little (never mirrored).
        restyle: also change their edges, gamma, hue and light, cover a part, take the colour of every tenth: for
            pictures of a style that was not trained on.
        keywords: put up to three tags behind every second training caption, where the source has tags.
        no_duplicates: avoid equal captions in a batch (of one source, looking eight batches ahead).
        tokenizer: `words` (the training set's own), or a folder with a tokenizer.json, or that file.
        max_words: of the `words` vocabulary.
        context_length: of a text, special tokens included; longer ones are cut.
        questions: give batches a question with its answer, where the source has questions.
        question_length: as `context_length`, question and answer together.
        full_length: pad every text to `context_length`, for compiled models; else to the longest of the batch.
        object_words: a file of words that name objects, one a line, for object masking of samples without labels.
        concreteness: a table of words and ratings from 1 to 5 (Brysbaert et al. 2014), for `top_concrete` masking.
        workers: processes that read and decode; 0 for the training process itself.
        prefetch: batches that each worker keeps ready.
        pin_memory: put batches where a GPU can copy from in the background.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    mix: Literal["sample", "batch"] = "sample"
    size: int = 48
    max_pixels: int = MAX_PIXELS
    augment: bool = True
    restyle: bool = False
    keywords: bool = True
    no_duplicates: bool = False
    tokenizer: str = "words"
    max_words: int = 20_000
    context_length: int = 32
    questions: bool = False
    question_length: int = 24
    full_length: bool = False
    object_words: str | None = None
    concreteness: str | None = None
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
