"""Batches: what is in them, and that a step's batch is the same after resuming and for any workers and processes."""

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("PIL")

from trainer_data_cases import same

from fastvlm_loss.data import Pairs, Splits, emoji, shapes
from fastvlm_loss.data.npm import FetchError
from fastvlm_loss.trainer.data import ATTRIBUTE, CONTENT, OBJECT, STOP, Data, DataConfig, Loader, SourceConfig, embedded
from fastvlm_loss.trainer.data.samples import caption_id

SHAPES = SourceConfig(samples=300)


@pytest.fixture(autouse=True, scope="module")
def few_held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "HELD", 60)
        yield


@pytest.fixture(scope="module")
def data(few_held_out):
    return Data.open(DataConfig(sources=(SHAPES,), size=24, questions=True), seed=3)


def test_shapes_and_dtypes(data):
    batch = next(iter(Loader(data, 32)))
    text, question = batch["text"], batch["question"]
    assert batch["images"].shape == (32, 24, 24, 3) and batch["images"].dtype == torch.uint8
    assert batch["index"].dtype == batch["ids"].dtype == torch.int64 and (batch["ids"] >= 0).all()
    assert batch["ids"].tolist() == [caption_id(caption) for caption in batch["captions"]]
    kinds = {name: value.dtype for name, value in text.items()}
    assert kinds == {
        "tokens": torch.int64, "mask": torch.bool, "word": torch.int64, "kind": torch.uint8,
        "concreteness": torch.float32,
    }  # fmt: skip
    assert len({value.shape for value in text.values()}) == 1 and text["tokens"].shape[1] % 4 == 0
    assert question["tokens"].shape == question["mask"].shape and question["tokens"].shape[1] % 4 == 0
    for name, dtype in (("prompt_lengths", torch.int64), ("answer", torch.int64), ("weight", torch.float32)):
        assert question[name].shape == (32,) and question[name].dtype == dtype
    assert batch["step"] == 0


def test_a_row_says_what_its_scene_says(data):
    tokenizer = data.tokenizer
    for batch in Loader(data, 30, stop=3):
        for i, caption in enumerate(batch["captions"]):
            scene = shapes.scene(3, int(batch["index"][i]))
            text = {name: value[i] for name, value in batch["text"].items()}
            assert caption == scene.caption and tokenizer.decode(text["tokens"].tolist()) == caption
            words = caption.split()
            n = len(words)
            assert text["tokens"][0] == tokenizer.cls_id and text["tokens"][n + 1] == tokenizer.sep_id
            assert text["mask"].tolist() == [j < n + 2 for j in range(len(text["mask"]))]
            assert text["word"].tolist() == [-1, *range(n), *[-1] * (len(text["word"]) - n - 1)]
            named = {kind: {caption[s.start : s.end] for s in scene.spans if s.kind == kind} for kind in (
                "object", "attribute")}  # fmt: skip
            for j, word in enumerate(words):
                flags, rating = CONTENT, 2.0
                if word in named["object"]:
                    flags, rating = CONTENT | OBJECT, 5.0
                elif word in named["attribute"]:
                    flags, rating = CONTENT | ATTRIBUTE, 4.0
                elif word in ("a", "on", "of", "and", "above", "below"):
                    flags, rating = STOP, 1.0
                assert (int(text["kind"][j + 1]), float(text["concreteness"][j + 1])) == (flags, rating), word
            asked = {name: value[i] for name, value in batch["question"].items()}
            length = int(asked["prompt_lengths"])
            tokens = asked["tokens"][asked["mask"]].tolist()
            question = tokenizer.decode(tokens[:length])
            answer = tokenizer.decode(tokens[length:])
            assert (question, answer) in [(q.question, q.answer) for q in scene.questions]
            assert tokens[length - 1] == tokens[-1] == tokenizer.sep_id and asked["answer"] == tokens[length]
            assert asked["weight"] == 1 and answer in data.answers


def test_an_epoch_passes_every_sample_once_and_the_next_in_another_order(data):
    config = replace(data.config, augment=False)
    batches = list(Loader(replace(data, config=config), 25, stop=24))
    first, second = ([i for b in part for i in b["index"].tolist()] for part in (batches[:12], batches[12:]))
    assert len(set(first)) == 300 and sorted(first) == sorted(second) and first != second
    drawn = shapes.sample(3, first[7], size=24)
    assert torch.equal(batches[0]["images"][7], torch.from_numpy(drawn.image))
    assert not torch.equal(next(iter(Loader(data, 25)))["images"][7], torch.from_numpy(drawn.image))  # augmented


def test_what_is_evaluated_on_is_never_trained_on(data):
    held = data.held(50)
    train = {data.sources[0].train.read(i, picture=False).caption for i in range(300)}
    assert len(held) == 50 and not {sample.caption for sample in held} & train
    assert held[0].distractors and all(text != held[0].caption for text in held[0].distractors)
    batches = list(data.batches(held, 20))
    assert [len(batch["captions"]) for batch in batches] == [20, 20, 10]
    assert torch.equal(batches[1]["images"][3], torch.from_numpy(held[23].image))
    same(batches[2], list(data.batches(held, 20))[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_batches_of_an_unbroken_run(data, workers):
    whole = list(Loader(data, 40, stop=20))  # 7 batches an epoch
    config = replace(data.config, workers=workers)
    for batch, expected in zip(Loader(replace(data, config=config), 40, start=5, stop=20), whole[5:], strict=True):
        same(batch, expected)


def test_two_processes_share_the_batch_of_one(data):
    whole = list(Loader(data, 40, stop=9))
    for rank in (0, 1):
        for share, batch in zip(Loader(data, 40, rank, 2, stop=9), whole, strict=True):
            rows = slice(20 * rank, 20 * rank + 20)
            for name in ("images", "index", "ids", "captions"):
                assert (share[name] == batch[name][rows]) if name == "captions" else torch.equal(
                    share[name], batch[name][rows])  # fmt: skip
            for part in ("text", "question"):
                for name, value in share[part].items():
                    width = value.shape[1] if value.dim() == 2 else None
                    expected = batch[part][name][rows] if width is None else batch[part][name][rows, :width]
                    assert torch.equal(value, expected), name


def test_workers_may_be_started_in_any_way(data):
    steps = Loader(data, 40).steps
    same(pickle.loads(pickle.dumps(steps))[9], steps[9])  # what spawn and forkserver do


def test_nothing_is_drawn_from_the_global_generator(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for workers in (0, 1):
        list(Loader(replace(data, config=replace(data.config, workers=workers)), 40, stop=2))
    assert torch.equal(torch.rand(3), expected)


def test_texts_are_cut_or_padded_to_their_length(data):
    config = DataConfig(sources=(SHAPES,), size=24, questions=True, context_length=6, question_length=7)
    short = next(iter(Loader(Data.open(config, 3, data.tokenizer), 32)))
    whole = next(iter(Loader(data, 32)))
    assert short["text"]["tokens"].shape == (32, 6)
    assert torch.equal(short["text"]["tokens"][:, :5], whole["text"]["tokens"][:, :5])
    assert (short["text"]["tokens"][:, 5] == data.tokenizer.sep_id).all() and short["text"]["word"].max() == 3
    assert short["question"]["tokens"].shape == (32, 7)
    assert torch.equal(short["question"]["answer"], whole["question"]["answer"])
    at = short["question"]["prompt_lengths"][:, None]
    assert torch.equal(short["question"]["tokens"].gather(1, at)[:, 0], short["question"]["answer"])
    full = DataConfig(sources=(SHAPES,), size=24, questions=True, full_length=True)
    batch = next(iter(Loader(Data.open(full, 3, data.tokenizer), 32)))
    assert batch["text"]["tokens"].shape == (32, 32) and batch["question"]["tokens"].shape == (32, 24)


def test_keywords_follow_half_of_the_captions(data, monkeypatch):
    part = data.sources[0].train
    read = type(part).read

    def tagged_read(self, number, picture=True):
        return replace(read(self, number, picture), tags=("alpha", "beta", "gamma", "delta"))

    monkeypatch.setattr(type(part), "read", tagged_read)
    steps = Loader(data, 100, stop=3).steps
    tagged, counts = 0, Counter()
    for step in range(3):
        samples = [part.read(int(n), picture=False) for n in steps.order.rows(step)[1]]
        for sample, text in zip(samples, steps._texts(samples, step), strict=True):
            assert text.startswith(sample.caption)
            words = text.removeprefix(sample.caption).split()
            assert len(set(words)) == len(words) in (0, 3)
            tagged += bool(words)
            counts.update(words)
    assert abs(tagged - 150) < 4 * 300**0.5 / 2
    assert set(counts) == {"alpha", "beta", "gamma", "delta"}
    assert all(abs(n - tagged * 0.75) < 4 * (tagged * 0.1875) ** 0.5 for n in counts.values())


def test_emoji_with_their_tags(monkeypatch):
    def pairs(name, captions, red):
        images = torch.zeros(len(captions), 24, 24, 3, dtype=torch.uint8)
        images[..., 0] = torch.arange(red, red + len(captions))[:, None, None]
        return Pairs(name, images, captions, [[f"tag {caption}"] for caption in captions])

    train, test = pairs("emoji train", ["cat", "dog", "cat"], 0), pairs("emoji test", ["cat", "fox"], 50)
    monkeypatch.setattr(emoji, "load", lambda size: Splits(train, test, ""))
    config = DataConfig(sources=(SHAPES, SourceConfig("emoji", weight=0.5)), size=24, augment=False)
    data = Data.open(config, 3)
    assert "fox" not in data.tokenizer.vocabulary and {"cat", "tag"} < set(data.tokenizer.vocabulary)
    batch = next(iter(Loader(data, 4)))
    rows = [i for i, index in enumerate(batch["index"].tolist()) if index >> 40]
    assert len(rows) == 1 and batch["captions"][rows[0]] in ("cat", "dog")
    assert int(batch["images"][rows[0], 0, 0, 0]) == int(batch["index"][rows[0]]) - (1 << 40)
    assert [s.index for s in data.held(120) if s.caption == "fox"] == [(1 << 40) + 4]
    assert len({int(i) for i, c in zip(batch["ids"], batch["captions"], strict=True) if c == "cat"}) <= 1

    def gone(size):
        raise FetchError("npm is not installed")

    monkeypatch.setattr(emoji, "load", gone)
    with pytest.raises(ValueError, match="sources: got 'emoji', which is not available: npm is not installed"):
        Data.open(config, 3)


def test_arguments_are_named(data):
    for options, message in (
        ({"batch_size": 31, "world": 2}, "batch_size: got 31, wanted a multiple of the 2 processes"),
        ({"batch_size": 301}, "batch_size: got 301, which takes 301 rows of shapes at weight 1, wanted 1 to 300"),
        ({"batch_size": 8, "weights": [1.0, 1.0]}, r"weights: got \[1.0, 1.0\] for 1 sources"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(data, **options)
    for changed, message in (
        ({"sources": ()}, "sources: got none"),
        ({"context_length": 2}, "context_length: got 2, wanted at least 3"),
        ({"sources": (replace(SHAPES, evaluation="x"),)}, "evaluation: got x, wanted none"),
    ):
        with pytest.raises(ValueError, match=message):
            Data.open(replace(data.config, **changed))
