"""Texts to tokens: words of the training set, or a tokenizer of Hugging Face's format from the disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..data.tokenizer import words as words_of

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# what the five are called elsewhere: BERT, RoBERTa and T5, CLIP and GPT-2
_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls_token": ("[CLS]", "<s>", "<|startoftext|>"),
    "sep_token": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask_token": ("[MASK]", "<mask>"),
}


class Encoded(NamedTuple):
    """A text without [CLS] and [SEP]: its tokens, the number of each one's word, and the words (lower case)."""

    tokens: list[int]
    words: list[int]
    texts: list[str]


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer; ``len`` is the size of the vocabulary, special tokens included."""

    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]

    def __len__(self) -> int: ...

    def encode(self, text: str) -> Encoded:
        """Tokens, words and the words' texts of a text of any length."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens, without the special ones but [MASK] and [UNK]."""
        ...

    def state(self) -> dict[str, Any]:
        """All that ``load`` needs, as JSON values."""
        ...


class WordVocabulary:
    """One token a word: the special tokens, then ``words`` in the order of their ids."""

    pad_id, unk_id, cls_id, sep_id, mask_id = PAD, UNK, CLS, SEP, MASK
    special_ids: tuple[int, ...] = (PAD, UNK, CLS, SEP, MASK)

    def __init__(self, words: Sequence[str]) -> None:
        self.vocabulary = [*SPECIAL, *words]
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            twice = next(word for word, count in Counter(self.vocabulary).items() if count > 1)
            raise ValueError(f"words: got {twice!r} twice or as a special token, wanted different words")

    @classmethod
    def from_texts(cls, texts: Iterable[str], max_words: int = 20_000) -> WordVocabulary:
        """The ``max_words`` most frequent words of these texts, equally frequent ones by name."""
        counts = Counter(word for text in texts for word in words_of(text))
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:max_words])

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Encoded:
        """Lower-case words and punctuation marks, unknown ones as [UNK]."""
        found = words_of(text)
        return Encoded([self._ids.get(word, UNK) for word in found], list(range(len(found))), found)

    def decode(self, tokens: Sequence[int]) -> str:
        """The words, joined by spaces."""
        return " ".join(self.vocabulary[token] for token in tokens if token not in (PAD, CLS, SEP))

    def state(self) -> dict[str, Any]:
        """The words."""
        return {"kind": "words", "words": self.vocabulary[len(SPECIAL) :]}


class LocalTokenizer:
    """A fast tokenizer of transformers; special tokens it lacks are added behind its vocabulary.

    [CLS] may be its first token (<s>, <|startoftext|>) and [SEP] its last one (</s>, <|endoftext|>).
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner  # a transformers.PreTrainedTokenizerFast
        inner.cls_token = inner.cls_token or inner.bos_token
        inner.sep_token = inner.sep_token or inner.eos_token
        known = inner.get_vocab()
        for (role, names), added in zip(_NAMES.items(), SPECIAL, strict=True):
            if getattr(inner, role) is None:
                inner.add_special_tokens({role: next((name for name in names if name in known), added)})
        roles = [int(inner.convert_tokens_to_ids(getattr(inner, role))) for role in _NAMES]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = roles
        self.special_ids = tuple(sorted({*roles, *inner.all_special_ids}))
        self._size = len(inner)

    @classmethod
    def open(cls, path: str | Path) -> LocalTokenizer:
        """A folder with a ``tokenizer.json`` or that file. Raises ValueError where it is missing or unreadable."""
        transformers: Any = import_module("transformers")
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer: got {path}, wanted 'words', or a folder with tokenizer.json, or that file")
        try:
            if (file.parent / "tokenizer_config.json").is_file():
                return cls(transformers.AutoTokenizer.from_pretrained(file.parent, local_files_only=True))
            return cls(transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"tokenizer: got {file}, which transformers cannot read ({error})") from error

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> Encoded:
        """Sub-tokens; the words are those of its pre-tokenizer."""
        found = self.inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        numbers: dict[int | None, int] = {}
        words = [numbers.setdefault(word, len(numbers)) for word in found.word_ids()]
        ends = [[len(text), 0] for _ in numbers]
        for word, (start, end) in zip(words, found["offset_mapping"], strict=True):
            ends[word] = [min(ends[word][0], start), max(ends[word][1], end)]
        return Encoded(list(found["input_ids"]), words, [text[start:end].strip().lower() for start, end in ends])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text as the tokenizer itself joins it."""
        hidden = (self.pad_id, self.cls_id, self.sep_id)
        return str(self.inner.decode([token for token in tokens if token not in hidden]))

    def state(self) -> dict[str, Any]:
        """The whole tokenizer, so that a checkpoint needs no other file."""
        special = {role: str(getattr(self.inner, role)) for role in _NAMES}
        return {"kind": "tokenizers", "special": special, "tokenizer": self.inner.backend_tokenizer.to_str()}


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer as JSON."""
    Path(path).write_text(json.dumps(tokenizer.state(), ensure_ascii=False), encoding="utf-8")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote. Raises ValueError for anything else."""
    try:
        return from_state(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: got {path}, which is no saved tokenizer ({error})") from error


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is."""
    if state["kind"] == "words":
        return WordVocabulary(state["words"])
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    rust = tokenizers.Tokenizer.from_str(state["tokenizer"])
    return LocalTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **state["special"]))
