"""Pairs, batches in an order that the step alone determines, and the word tokenizer."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from fastvlm_loss.data import Pairs, WordTokenizer, batches
from fastvlm_loss.data.pairs import caption_ids, split_by_caption
from fastvlm_loss.data.tokenizer import END, PAD, UNKNOWN, words


def pairs(count: int = 23, tags: bool = True) -> Pairs:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    captions = [f"caption {i % 20}" for i in range(count)]
    return Pairs(
        "test", images, captions, [[f"t{i}a", f"t{i}b", f"t{i}c", f"t{i}d"] for i in range(count)] if tags else None
    )


def test_ids_are_equal_where_captions_are():
    assert caption_ids(["a", "b", "a", "c", "b"]).tolist() == [0, 1, 0, 2, 1]
    assert pairs().ids[20:].tolist() == pairs().ids[:3].tolist()


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="captions: got 2 for 3 images"):
        Pairs("x", torch.zeros(3, 2, 2, 3, dtype=torch.uint8), ["a", "b"])
    with pytest.raises(ValueError, match="tags: got 1 for 2 images"):
        Pairs("x", torch.zeros(2, 2, 2, 3, dtype=torch.uint8), ["a", "b"], [["t"]])


def test_each_epoch_visits_every_pair_once_in_another_order():
    data = pairs(24)
    order = [batch.images[:, 0, 0, 0].tolist() for batch in batches(data, 6, seed=3, steps=8)]
    first, second = ([*chain.from_iterable(epoch)] for epoch in (order[:4], order[4:]))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


def test_batches_hold_what_belongs_together():
    for batch in batches(pairs(), 5, seed=0, steps=4):
        for image, text, caption_id in zip(
            batch.images[:, 0, 0, 0].tolist(), batch.texts, batch.ids.tolist(), strict=True
        ):
            assert text.startswith(f"caption {image % 20}") and caption_id == image % 20


def test_a_later_start_sees_the_same_batches():
    whole = list(batches(pairs(), 5, seed=1, steps=13))
    for start in (1, 4, 9):
        for batch, later in zip(whole[start:], batches(pairs(), 5, seed=1, steps=13, start=start), strict=True):
            assert batch.step == later.step and batch.texts == later.texts
            assert torch.equal(batch.images, later.images) and torch.equal(batch.ids, later.ids)
    assert [b.texts for b in batches(pairs(), 5, seed=2, steps=13)] != [b.texts for b in whole]


def test_keywords_are_three_of_the_pictures_own_tags_on_half_of_the_texts():
    texts = [text for batch in batches(pairs(), 23, seed=0, steps=40) for text in batch.texts]
    tagged = [text.split()[2:] for text in texts if len(text.split()) > 2]
    assert 0.4 < len(tagged) / len(texts) < 0.6
    assert all(len(set(tags)) == 3 and len({tag[:-1] for tag in tags}) == 1 for tags in tagged)
    assert all(len(text.split()) == 2 for batch in batches(pairs(tags=False), 23, 0, 3) for text in batch.texts)


@pytest.mark.parametrize("size", [0, 24])
def test_batch_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"batch_size: got {size}, wanted 1 to 23"):
        next(batches(pairs(), size, seed=0, steps=1))


def test_split_by_caption_shares_no_caption():
    many = Pairs("m", torch.zeros(600, 1, 1, 3, dtype=torch.uint8), [f"thing {i % 300}" for i in range(600)])
    train, test = split_by_caption(many)
    assert len(train) + len(test) == 600 and 20 < len(test) < 120
    assert not set(train.captions) & set(test.captions)
    assert len(split_by_caption(many, limit=7)[1]) == 7


def test_words():
    assert words("Flag: Côte d'Ivoire") == ["flag", ":", "côte", "d'ivoire"]
    assert words("snake_case, 3-D!") == ["snake", "case", ",", "3", "-", "d", "!"]
    assert words("") == []


def test_round_trip():
    texts = ["a small red star", "flag : côte d'ivoire", "star star"]
    tokenizer = WordTokenizer.from_texts(texts)
    tokens = tokenizer(texts)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 5)
    assert tokenizer.decode(tokens) == texts
    assert tokens[2].tolist() == [tokens[2, 0], tokens[2, 0], END, PAD, PAD]
    again = WordTokenizer(tokenizer.vocabulary, tokenizer.context_length)
    assert torch.equal(again(texts), tokens)


def test_unknown_words_and_long_texts():
    tokenizer = WordTokenizer.from_texts(["one two"], context_length=4)
    assert tokenizer(["one three"])[0, 1] == UNKNOWN
    long = tokenizer(["one two one two one two"])
    assert long.shape == (1, 4) and long[0, -1] == END
    assert tokenizer([]).shape == (0, 1)
    assert tokenizer([""]).tolist() == [[END]]


def test_vocabulary_keeps_the_frequent_words():
    tokenizer = WordTokenizer.from_texts(["b b a", "a c"], max_words=2)
    assert tokenizer.vocabulary == ["<pad>", "<unk>", "<end>", "a", "b"]
    with pytest.raises(ValueError, match="vocabulary: got one that starts with"):
        WordTokenizer(["a", "b"])
