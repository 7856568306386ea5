"""The parts of an evaluation against slower ways to the same: ranks by sorting, greedy texts, attention, negatives."""

import math
from dataclasses import replace

import pytest
import torch
from evaluation_cases import CPU, Oracle, data, real

from fastvlm_loss.trainer.evaluation import matching, words
from fastvlm_loss.trainer.evaluation.held import encode, encode_texts
from fastvlm_loss.trainer.evaluation.looking import HARDNESS, looks, picks
from fastvlm_loss.trainer.evaluation.questions import questions
from fastvlm_loss.trainer.evaluation.retrieval import reordered
from fastvlm_loss.trainer.evaluation.writing import agreement, written


@pytest.fixture(scope="module")
def held():
    with torch.no_grad():
        return encode(real().eval(), data().tokenizer, data().collate, data().held(40), CPU)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_reordered_candidates_against_sorting():
    generator = torch.Generator().manual_seed(0)
    count, k = 50, 6
    ids = torch.randint(0, 30, (count,), generator=generator)
    candidates = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(count)])
    scores = torch.randn(count, k, generator=generator)
    before = torch.arange(count) + 7
    found = reordered(before, candidates, scores, ids)
    for i in range(count):
        order = sorted(range(k), key=lambda j: -scores[i, j].item())
        assert found.order[i].tolist() == [candidates[i, j].item() for j in order]
        right = [n for n, j in enumerate(order) if ids[candidates[i, j]] == ids[i]]
        assert found.ranks[i] == (right[0] if right else before[i]), "beyond the candidates nothing moves"
    assert 0 < sum(bool((ids[c] == ids[i]).any()) for i, c in enumerate(candidates)) < count


def test_level_and_nan_scores_count_against():
    ids, candidates = torch.tensor([0, 1, 2]), torch.tensor([[0, 1, 2]] * 3)
    assert reordered(torch.zeros(3, dtype=torch.int64), candidates, torch.ones(3, 3), ids).ranks.tolist() == [2, 2, 2]
    broken = torch.full((3, 3), torch.nan)
    assert reordered(torch.zeros(3, dtype=torch.int64), candidates, broken, ids).ranks.tolist() == [2, 2, 2]


def test_pairs_match_as_one_by_one(held):
    image, text = torch.tensor([[0, 3, 39], [3, 0, 7]]), torch.tensor([[5, 3, 0], [3, 5, 39]])
    found = held.match(image, text)
    for i, t, value in zip(image.flatten(), text.flatten(), found.flatten(), strict=True):
        length = int(held.texts.lengths[t])
        alone = held.model(
            "fuse", held.texts.hidden[t : t + 1, :length], held.texts.mask[t : t + 1, :length], held.tokens[i : i + 1]
        )
        no, yes = held.model("match", alone, held.features[i : i + 1], held.texts.features[t : t + 1])[0]
        assert value.item() == pytest.approx((yes - no).item(), abs=2e-5)
    assert held.match(image[:, :0], text[:, :0]).shape == (2, 0)


def test_a_pair_that_is_asked_for_twice_is_fused_once():
    oracle = Oracle(data().held(12))
    held = encode(oracle, data().tokenizer, data().collate, oracle.samples, CPU)
    rows = []
    oracle._fuse = lambda hidden, *rest: rows.append(len(hidden)) or Oracle._fuse(oracle, hidden, *rest)
    held.match(torch.tensor([1, 1, 2, 1]), torch.tensor([0, 0, 2, 0]))
    assert rows == [2]


def test_a_greedy_text_agrees_with_itself_and_no_other(held):
    batch, own = held.collate.question([s.questions[0] for s in held.samples]), torch.arange(len(held))
    prompts = batch["prompt_lengths"]
    texts = written(held, batch["tokens"], prompts, own, most=6)
    ids = [held.tokenizer.encode(text).tokens for text in texts]
    width = max(int(p) + len(t) for p, t in zip(prompts, ids, strict=True))
    tokens, mask = torch.zeros(len(held), width, dtype=torch.int64), torch.zeros(len(held), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts.tolist(), ids, strict=True)):
        tokens[row, :prompt] = batch["tokens"][row, :prompt]
        tokens[row, prompt : prompt + len(answer)] = torch.tensor(answer)
        mask[row, : prompt + len(answer)] = True
    agrees, counts = agreement(held, tokens, mask, prompts, own)
    unknown = tokens[:, 1:] == held.tokenizer.unk_id
    assert (agrees | unknown)[counts].all() and counts.sum() == sum(map(len, ids))
    assert not agrees[~counts].any()
    reference, there = agreement(held, batch["tokens"], batch["mask"], prompts, own)
    assert (there.sum(1) == 2).all(), "an answer of one word and [SEP]"
    first = [text.split()[:1] for text in texts]
    said = [answer.split()[:1] for s in held.samples for _, answer in s.questions[:1]]
    at = prompts - 1
    assert reference[own, at].tolist() == [a == b for a, b in zip(first, said, strict=True)]


def test_drawn_texts_are_a_function_of_the_generator(held):
    few, begin = torch.arange(5), held.batch["tokens"][:5, :1]
    one = torch.ones(5, dtype=torch.int64)
    texts = [written(held, begin, one, few, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    banned = ("[MASK]",)
    assert not any(word in text for text in texts[0] for word in banned)


def test_hidden_words_are_hidden_wholly_and_are_objects(held):
    tokens, labels = words.hidden_words(held, seed=3)
    assert ((labels >= 0).sum(1) == 1).all() and (tokens[labels >= 0] == held.tokenizer.mask_id).all()
    for sample, row in zip(held.samples, labels, strict=True):
        assert held.tokenizer.decode(row[row >= 0].tolist()) in sample.objects


def test_hardest_negatives_by_brute_force(held):
    same = [replace(s, caption=held.samples[i // 2 * 2].caption) for i, s in enumerate(held.samples)]
    twice = encode(held.model, held.tokenizer, held.collate, same, CPU)
    images, texts = matching.hardest(twice, batch_size=16)
    scores = twice.features @ twice.texts.features.T
    for i in range(len(same)):
        batch = range(i // 16 * 16, min(len(same), i // 16 * 16 + 16))
        wrong = [j for j in batch if same[j].caption != same[i].caption]
        assert scores[i, texts[i]].item() == pytest.approx(max(scores[i, j].item() for j in wrong), abs=1e-5)
        assert scores[images[i], i].item() == pytest.approx(max(scores[j, i].item() for j in wrong), abs=1e-5)
        assert texts[i] in wrong and images[i] in wrong


def test_the_usual_answer_is_counted_by_the_first_two_words():
    asked = (("what colour is it", "red"), ("what colour is that", "red"), ("what size is it", "small"))
    samples = [
        replace(s, questions=asked if k else (("what colour is it", "blue"),)) for k, s in enumerate(data().held(3))
    ]
    held = encode(Oracle(samples), data().tokenizer, data().collate, samples, CPU)
    assert questions(held)["vqa/majority"] == pytest.approx(100 * 6 / 7)


def test_attention_is_that_of_the_hidden_word(held):
    shown = torch.tensor([2, 11])
    found = looks(held, shown, seed=0)
    assert [look.sample for look in found] == [2, 11]
    tokens, labels = (t[shown] for t in words.hidden_words(held, 0))
    mask = held.batch["mask"][shown]
    hidden = held.model("text", tokens, mask)["hidden"]
    maps = []
    for layer in held.model.fusion.layer:  # by the layers' own parts
        attention = layer.attention(hidden, (mask[:, None, None, :]), is_causal=False)[0]
        cross = layer.crossattention.self
        query, key = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (cross.query(attention), cross.key(held.tokens[shown]))
        )
        maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1))
        hidden = layer(hidden, mask[:, None, None, :], held.tokens[shown], is_causal=False)
    wanted = torch.stack(maps).mean(0)
    for row, look in enumerate(found):
        place = int((labels[row] >= 0).nonzero())
        parts = wanted[row, place, 1:]  # the first token is the whole picture's
        assert torch.allclose(look.heat.flatten(), parts / parts.sum(), atol=1e-5)
        assert look.heat.sum().item() == pytest.approx(1, abs=1e-5) and look.heat.shape == (4, 4)
        assert "[MASK]" in look.caption and look.word in held.samples[look.sample].objects


def test_attention_of_a_text_as_long_as_the_picture():
    samples = [s for s in data().held(200) if len(s.objects) == 1][:3]
    long = [replace(s, caption=s.caption + " and some more words") for s in samples]
    held = encode(real().eval(), data().tokenizer, data().collate, long, CPU)
    for name, value in held.batch.items():
        if value.shape[1:] == (16,):
            filler = held.tokenizer.pad_id if name == "tokens" else 0
            held.batch[name] = torch.nn.functional.pad(value, (0, 1), value=filler)
    assert held.batch["tokens"].shape[1] == held.tokens.shape[1] == 17
    found = looks(held, torch.arange(3), seed=0)
    assert [look.heat.sum().item() for look in found] == pytest.approx([1] * 3, abs=1e-5)


def test_a_model_whose_attention_cannot_be_seen_has_no_looks():
    samples = data().held(3)
    assert looks(encode(Oracle(samples), data().tokenizer, data().collate, samples, CPU), torch.arange(3), 0) == []


def test_picked_negatives_are_other_captions_of_the_batch(held):
    shown = torch.tensor([30, 4, 9])
    found = picks(held, shown, batch_size=12, seed=0)
    assert tuple(found.texts) == HARDNESS and torch.equal(found.samples, shown)
    batch = torch.cat([shown, torch.tensor([i for i in range(40) if i not in (30, 4, 9)])[:9]])
    for texts in found.texts.values():
        assert texts.shape == (3, 4) and all(set(row) <= set(batch.tolist()) for row in texts.tolist())
        assert all(held.ids[i] not in held.ids[row] for i, row in zip(shown, texts, strict=True))
    scores = held.features[shown] @ held.texts.features[batch].T
    scores[torch.arange(3), torch.arange(3)] = -torch.inf
    assert torch.equal(found.texts[math.inf], batch[scores.topk(4).indices])


def test_texts_in_parts_are_the_same(held, monkeypatch):
    from fastvlm_loss.trainer.evaluation import held as module

    whole = encode_texts(held.model, held.batch["tokens"], held.batch["mask"], CPU)
    monkeypatch.setattr(module, "ROWS", 7)
    parts = encode_texts(held.model, held.batch["tokens"], held.batch["mask"], CPU)
    assert torch.allclose(whole.features, parts.features, atol=1e-5)
    own = torch.arange(len(held))
    few = held.match(own, own.flip(0))
    monkeypatch.undo()
    assert torch.allclose(few, held.match(own, own.flip(0)), atol=1e-5)
