"""Masking: rates, strategies against their definitions, fallbacks, and that every draw depends on its key alone."""

import math

import pytest
import torch

from fastvlm_loss.trainer.data.words import ATTRIBUTE, CONTENT, OBJECT, STOP
from fastvlm_loss.trainer.masking import STRATEGIES, Masker
from fastvlm_loss.trainer.text import CLS, MASK, PAD, SEP, UNK, WordVocabulary

VOCABULARY = WordVocabulary([f"w{i}" for i in range(200)])
ROWS = 20_000


def batch(
    rows=ROWS, kinds=(STOP, CONTENT | ATTRIBUTE, CONTENT | OBJECT, STOP, CONTENT | OBJECT, CONTENT), pad=2, start=0
):
    """Rows of one caption, one token a word, with given kinds, other tokens in every row; and their indices."""
    length = len(kinds)
    tokens = torch.full((rows, length + 2 + pad), PAD)
    tokens[:, 0], tokens[:, length + 1] = CLS, SEP
    tokens[:, 1 : length + 1] = 5 + (torch.arange(rows)[:, None] * 7 + torch.arange(length) * 31) % 200
    word = torch.full_like(tokens, -1)
    word[:, 1 : length + 1] = torch.arange(length)
    kind = torch.zeros_like(tokens, dtype=torch.uint8)
    kind[:, 1 : length + 1] = torch.tensor(kinds, dtype=torch.uint8)
    rating = torch.zeros(tokens.shape)
    rating[:, 1 : length + 1] = torch.tensor([1 + k * 0.5 for k in range(length)])
    text = {"tokens": tokens, "mask": tokens != PAD, "word": word, "kind": kind, "concreteness": rating}
    return text, torch.arange(start, start + rows)


def pieces(rows=ROWS):
    """Three words of two, one and three tokens."""
    text, index = batch(rows)
    text["word"][:, 1:7] = torch.tensor([0, 0, 1, 2, 2, 2])
    return text, index


def within(count, total, share, sigmas=4):
    assert abs(count - total * share) <= sigmas * math.sqrt(total * share * (1 - share)), (count / total, share)


def chosen_words(out, text):
    return torch.where(out["labels"] >= 0, text["word"], -1).amax(1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_and_replacements(strategy):
    text, index = batch()
    before = {name: value.clone() for name, value in text.items()}
    out = Masker(strategy, VOCABULARY, seed=3)(text, index, 5)
    assert all(torch.equal(text[name], before[name]) for name in text)  # nothing is written into the batch
    chosen = out["labels"] >= 0
    assert torch.equal(out["labels"][chosen], text["tokens"][chosen])
    assert (out["labels"][~chosen] == -100).all() and torch.equal(out["tokens"][~chosen], text["tokens"][~chosen])
    assert chosen.any(1).all() and not chosen[text["word"] < 0].any()
    if strategy != "baseline":
        assert (chosen.sum(1) == 1).all()
    n, now, then = int(chosen.sum()), out["tokens"][chosen], text["tokens"][chosen]
    within(int((now == MASK).sum()), n, 0.8)
    within(int((now == then).sum()), n, 0.1 + 0.1 / 200)
    other = now[(now != MASK) & (now != then)]
    within(len(other), n, 0.1 * 199 / 200)
    assert other.min() >= 5
    expected = len(other) / 200  # uniform over the ordinary tokens: a chi-square of 199 degrees of freedom
    assert ((torch.bincount(other - 5, minlength=200) - expected) ** 2 / expected).sum() < 199 + 4 * math.sqrt(2 * 199)


def test_baseline_rates():
    text, index = batch()
    counts = (Masker("baseline", VOCABULARY)(text, index, 0)["labels"] >= 0).sum(1)
    none = 0.85**6
    within(int((counts == 1).sum()), ROWS, 6 * 0.15 * 0.85**5 + none)  # none chosen: one is forced
    within(int((counts == 2).sum()), ROWS, 15 * 0.15**2 * 0.85**4)
    many = Masker("baseline", VOCABULARY, probability=0.4)(text, index, 0)["labels"] >= 0
    for place in range(1, 7):
        within(int(many[:, place].sum()), ROWS, 0.4 + 0.6**6 / 6)  # the forced one is uniform


def test_whole_words():
    text, index = pieces()
    for masker in (Masker("baseline", VOCABULARY, whole_word=True), *(Masker(s, VOCABULARY) for s in STRATEGIES[1:])):
        chosen = masker(text, index, 1)["labels"] >= 0
        for first, last in ((1, 3), (3, 4), (4, 7)):
            part = chosen[:, first:last]
            assert torch.equal(part.any(1), part.all(1))
    apart = Masker("baseline", VOCABULARY)(text, index, 1)["labels"] >= 0
    assert (apart[:, 1] != apart[:, 2]).any()
    words = Masker("baseline", VOCABULARY, whole_word=True)(text, index, 1)["labels"][:, [1, 3, 4]] >= 0
    for word in range(3):
        within(int(words[:, word].sum()), ROWS, 0.15 + 0.85**3 / 3)


def test_objects_and_their_fallbacks():
    masker = Masker("objects", VOCABULARY)
    text, index = batch()
    words = chosen_words(masker(text, index, 0), text)
    for word in range(6):
        within(int((words == word).sum()), ROWS, 0.5 if word in (2, 4) else 0.0)
    text, index = batch(kinds=(STOP, CONTENT, STOP, CONTENT, CONTENT | ATTRIBUTE))
    words = chosen_words(masker(text, index, 0), text)
    for word in range(5):
        within(int((words == word).sum()), ROWS, 1 / 3 if word in (1, 3, 4) else 0.0)
    text, index = batch(kinds=(STOP,) * 6)
    assert torch.equal(masker(text, index, 0)["labels"], Masker("baseline", VOCABULARY)(text, index, 0)["labels"])


def test_content_and_its_fallbacks():
    masker = Masker("content", VOCABULARY)
    text, index = batch(kinds=(STOP, CONTENT, STOP, CONTENT | OBJECT))
    words = chosen_words(masker(text, index, 0), text)
    for word, share in enumerate((0.1, 0.4, 0.1, 0.4)):
        within(int((words == word).sum()), ROWS, share)
    for kinds in ((STOP, STOP), (CONTENT, CONTENT)):
        text, index = batch(kinds=kinds)
        within(int((chosen_words(masker(text, index, 0), text) == 0).sum()), ROWS, 0.5)


def test_top_concrete():
    masker = Masker("top_concrete", VOCABULARY)  # the helper's words grow more concrete along the text
    for kinds, shares in (
        ((CONTENT, STOP, CONTENT, CONTENT, CONTENT, STOP), (0, 0, 0.15, 0.30, 0.55, 0)),
        ((STOP, CONTENT, STOP, CONTENT), (0, 0.25, 0, 0.75)),
        ((STOP, CONTENT, STOP), (0, 1, 0)),
        ((STOP, STOP, STOP, STOP), (0.25,) * 4),
        ((CONTENT,), (1,)),
    ):
        text, index = batch(kinds=kinds)
        words = chosen_words(masker(text, index, 0), text)
        for word, share in enumerate(shares):
            within(int((words == word).sum()), ROWS, share)


def test_hard_follows_its_table():
    masker = Masker("hard", VOCABULARY, temperature=2.0, decay=0.5, warmup=10)
    text, index = batch(kinds=(STOP, CONTENT, CONTENT | OBJECT))
    text["tokens"][:, 1:4] = torch.tensor([5, 6, 7])
    assert (chosen_words(masker(text, index, 9), text) == 2).all()  # still as objects
    for word in range(3):
        within(int((chosen_words(masker(text, index, 10), text) == word).sum()), ROWS, 1 / 3)
    masker.observe(torch.tensor([5, 6, 5]), torch.tensor([1.0, 40.0, 3.0]))
    assert masker.table[5:8].tolist() == [1.0, 20.0, 0.0]
    masker.observe(torch.tensor([5]), torch.tensor([0.0]))
    assert masker.table[5:8].tolist() == [0.5, 20.0, 0.0]
    weights = torch.tensor([0.5, 5.0, 0.0]).div(2).exp()  # clipped at 5
    words = chosen_words(masker(text, index, 10), text)
    for word in range(3):
        within(int((words == word).sum()), ROWS, float(weights[word] / weights.sum()))
    other = Masker("hard", VOCABULARY, temperature=2.0, warmup=10)
    other.load_state_dict(masker.state_dict())
    assert torch.equal(other(text, index, 10)["labels"], masker(text, index, 10)["labels"])
    assert set(masker.state_dict()) == {"table"} and not Masker("objects", VOCABULARY).state_dict()


def test_hard_takes_the_mean_of_a_words_tokens():
    masker = Masker("hard", VOCABULARY)
    text, index = pieces()
    text["tokens"][:, 1:7] = torch.tensor([5, 6, 7, 8, 9, 10])
    masker.table[5:11] = torch.tensor([2.0, 0.0, 0.0, 3.0, 0.0, -3.0])
    words = chosen_words(masker(text, index, 0), text)
    weights = torch.tensor([1.0, 0.0, 0.0]).exp()
    for word in range(3):
        within(int((words == word).sum()), ROWS, float(weights[word] / weights.sum()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_depends_on_its_key_alone(strategy):
    text, index = batch(64)
    masker = Masker(strategy, VOCABULARY, seed=1)
    whole = masker(text, index, 7)
    assert torch.equal(whole["tokens"], Masker(strategy, VOCABULARY, seed=1)(text, index, 7)["tokens"])
    some = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    part = masker({name: value[some, :8] for name, value in text.items()}, index[some], 7)  # other rows, less padding
    assert torch.equal(part["tokens"], whole["tokens"][some, :8])
    assert torch.equal(part["labels"], whole["labels"][some, :8])
    far = index + (1 << 40)  # the same numbers in another source
    for changed in (masker(text, index, 8), masker(text, far, 7), Masker(strategy, VOCABULARY, seed=2)(text, index, 7)):
        assert not torch.equal(changed["tokens"], whole["tokens"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_never_chosen(strategy):
    text, index = batch(100, kinds=(CONTENT | OBJECT, CONTENT | OBJECT, STOP))
    text["tokens"][:, 1] = UNK
    text["word"][50:] = -1  # no words at all
    text["tokens"][50:, 1:] = PAD
    text["mask"] = text["tokens"] != PAD
    out = Masker(strategy, VOCABULARY)(text, index, 0)
    assert (out["labels"][:50] >= 0).any(1).all() and (out["labels"][:, 1] == -100).all()
    assert (out["labels"][50:] == -100).all() and torch.equal(out["tokens"][50:], text["tokens"][50:])
    empty = {name: value[:0] for name, value in text.items()}
    assert Masker(strategy, VOCABULARY)(empty, index[:0], 0)["labels"].shape == (0, 7)


def test_arguments_are_named():
    for options, message in (
        ({"strategy": "hardest"}, r"strategy: got 'hardest', wanted one of 'baseline'"),
        ({"probability": 0.0}, "probability: got 0.0, wanted more than 0"),
        ({"temperature": 0.0}, "temperature: got 0.0, wanted more than 0"),
        ({"decay": 1.0}, "decay: got 1.0, wanted at least 0 and less than 1"),
        ({"vocabulary": WordVocabulary([])}, "vocabulary: got special tokens only"),
    ):
        with pytest.raises(ValueError, match=message):
            Masker(**{"strategy": "hard", "vocabulary": VOCABULARY, **options})
