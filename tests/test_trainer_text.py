"""Tokenizers of the trainer: the training set's words, and tokenizers of Hugging Face's format from the disk."""

import json

import pytest

from fastvlm_loss.trainer import text
from fastvlm_loss.trainer.text import CLS, MASK, PAD, SEP, SPECIAL, UNK, LocalTokenizer, WordVocabulary

CAPTIONS = ["A red circle, left of a blue STAR", "two men's hats", "a flag: Côte d'Ivoire", "  ", "a red_star"]


def bert(folder):
    """A word-piece tokenizer with BERT's names, written as its two files."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    pieces = [*SPECIAL, "a", "red", "cir", "##cle", "##s", "star", ",", "un"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.add_special_tokens(list(SPECIAL))
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def bpe(folder):
    """A byte-level BPE as CLIP and GPT-2 have it: two special tokens, neither [MASK] nor padding."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(CAPTIONS * 3, trainer)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def test_words_by_frequency_then_name():
    vocabulary = WordVocabulary.from_texts(CAPTIONS)
    assert vocabulary.vocabulary[5:9] == ["a", "red", "star", ","]
    assert len(vocabulary) == 5 + 15
    assert WordVocabulary.from_texts(CAPTIONS, max_words=2).vocabulary[5:] == ["a", "red"]
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id) == (PAD, UNK, CLS) == (0, 1, 2)
    assert (vocabulary.sep_id, vocabulary.mask_id, vocabulary.special_ids) == (SEP, MASK, (0, 1, 2, 3, 4))


def test_words_there_and_back():
    vocabulary = WordVocabulary.from_texts(CAPTIONS)
    found = vocabulary.encode("A red, green STAR")
    assert found.texts == ["a", "red", ",", "green", "star"] and found.words == [0, 1, 2, 3, 4]
    assert found.tokens[3] == UNK
    assert vocabulary.decode([CLS, *found.tokens, SEP, PAD]) == "a red , [UNK] star"
    assert vocabulary.encode(" ") == ([], [], [])
    with pytest.raises(ValueError, match="words: got 'a' twice"):
        WordVocabulary(["a", "b", "a"])


def test_word_pieces_and_their_words(tmp_path):
    found = LocalTokenizer.open(bert(tmp_path))
    encoded = found.encode("Red circles, stars!")
    assert encoded.words == [0, 1, 1, 1, 2, 3, 3, 4] and encoded.texts == ["red", "circles", ",", "stars", "!"]
    assert encoded.tokens == [6, 7, 8, 9, 11, 10, 9, 1]
    assert (found.pad_id, found.unk_id, found.cls_id, found.sep_id, found.mask_id) == (0, 1, 2, 3, 4)
    assert len(found) == 13 and found.special_ids == (0, 1, 2, 3, 4)
    assert found.decode([2, *encoded.tokens[:5], 4, 3, 0]) == "red circles, [MASK]"
    assert found.encode("") == ([], [], [])


def test_a_folder_that_transformers_wrote(tmp_path):
    before = LocalTokenizer.open(bert(tmp_path))
    before.inner.save_pretrained(tmp_path / "saved")
    after = LocalTokenizer.open(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer_config.json").is_file()
    assert after.encode(CAPTIONS[0]) == before.encode(CAPTIONS[0]) and after.special_ids == before.special_ids


def test_a_tokenizer_without_mask_and_padding_gets_them(tmp_path):
    found = LocalTokenizer.open(bpe(tmp_path))
    plain = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    assert (found.cls_id, found.sep_id) == (0, 1)
    assert len(found) == plain + 2 and {found.pad_id, found.mask_id} == {plain, plain + 1}
    assert set(found.special_ids) == {0, 1, plain, plain + 1}
    encoded = found.encode("a red star")
    assert encoded.texts == ["a", "red", "star"] and encoded.words[-1] == 2
    assert found.decode([found.cls_id, *encoded.tokens, found.sep_id]).strip() == "a red star"


@pytest.mark.parametrize("make", [lambda folder: WordVocabulary.from_texts(CAPTIONS), bert, bpe])
def test_saved_as_one_file(tmp_path, make):
    made = make(tmp_path)
    before = made if isinstance(made, WordVocabulary) else LocalTokenizer.open(made)
    text.save(before, tmp_path / "vocabulary.json")
    for file in tmp_path.glob("tokenizer*.json"):
        file.unlink()
    after = text.load(tmp_path / "vocabulary.json")
    assert len(after) == len(before) and after.special_ids == before.special_ids
    for role in ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id"):
        assert getattr(after, role) == getattr(before, role)
    assert [after.encode(caption) for caption in CAPTIONS] == [before.encode(caption) for caption in CAPTIONS]


def test_what_is_no_tokenizer_is_named(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text("{}")
    for path, message in ((tmp_path / "gone", "gone, wanted 'words', or a folder"), (tmp_path, "cannot read")):
        with pytest.raises(ValueError, match=f"tokenizer: got .*{message}"):
            LocalTokenizer.open(path)
    for content in ("{}", "[", '{"kind": "words"}', "[1]"):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(ValueError, match="which is no saved tokenizer"):
            text.load(tmp_path / "vocabulary.json")
