"""Re-ranking by what a caption's words say: against slower ways to the same, and on a model that knows the words."""

from dataclasses import replace

import pytest
import torch
from evaluation_cases import CONFIG, CPU, Oracle, data, judged, real

from fastvlm_loss.trainer.cli import parse
from fastvlm_loss.trainer.config import EvaluationConfig
from fastvlm_loss.trainer.evaluation import evidence as module
from fastvlm_loss.trainer.evaluation import judge, retrieval
from fastvlm_loss.trainer.evaluation.evidence import evidence
from fastvlm_loss.trainer.evaluation.held import encode

WANTED = replace(CONFIG, evaluation=EvaluationConfig(rerank=4, evidence=8))
FIGURES = {f"evidence/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"evidence/r10"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def encoded(model, samples):
    return encode(model, data().tokenizer, data().collate, samples, CPU)


def test_halves_cover_every_word_once():
    held = encoded(real().eval(), data().held(30))
    first, second = module._halves(held, 3)
    words = held.batch["mask"] & (held.batch["word"] >= 0)
    assert torch.equal(first | second, words) and not (first & second).any()
    assert (second.sum(1) - first.sum(1) - words.sum(1) % 2 == 0).all(), "as many in each as can be"
    again = module._halves(held, 3)
    other = module._halves(held, 4)
    assert torch.equal(first, again[0]) and not torch.equal(first, other[0])


def test_no_piece_of_a_word_is_read_from_another():
    held = encoded(real().eval(), data().held(30))
    pieces = torch.where(held.batch["word"] >= 0, held.batch["word"] // 2, -1)  # every two tokens are one word
    held = replace(held, batch={**held.batch, "word": pieces})
    for half in module._halves(held, 3):
        for hidden, word in zip(half, pieces, strict=True):
            assert not set(word[hidden].tolist()) & set(word[~hidden].tolist())


def test_a_likelihood_is_the_sum_of_dense_log_probabilities():
    held = encoded(real().eval(), data().held(30))
    hidden, _ = module._halves(held, 0)
    image, text = torch.tensor([4, 4, 29, 0]), torch.tensor([4, 7, 3, 3])
    found = module._likelihood(held, image, text, hidden)
    weight, bias = held.model("vocabulary")
    for i, t, value in zip(image.tolist(), text.tolist(), found.tolist(), strict=True):
        one = slice(t, t + 1)
        tokens = held.batch["tokens"][one].masked_fill(hidden[one], held.tokenizer.mask_id)
        fused = held.fuse(tokens, held.batch["mask"][one], None, torch.tensor([i]))[0]
        logs = (held.model("words", fused) @ weight.T + bias).log_softmax(1)
        wanted = logs.gather(1, held.batch["tokens"][one].T)[hidden[t]].sum().item()
        assert value == pytest.approx(wanted, abs=1e-4)


def test_evidence_is_the_mutual_information_of_words_and_picture():
    held = encoded(real().eval(), data().held(30))
    image, text = torch.tensor([[0, 3, 29], [3, 0, 7]]), torch.tensor([[5, 3, 0], [3, 5, 29]])
    found = evidence(held, image, text, 10, seed=2)
    others, halves = torch.arange(1, 30, 3), module._halves(held, 2)

    def whole(i, t):
        return sum(module._likelihood(held, i.reshape(1), t.reshape(1), half) for half in halves).double().item()

    for i, t, value in zip(image.flatten(), text.flatten(), found.flatten().tolist(), strict=True):
        beside = torch.tensor([whole(other, t) for other in others]).exp().mean().log()
        assert value == pytest.approx(whole(i, t) - beside.item(), abs=2e-4)
    assert torch.equal(found, evidence(held, image, text, 10, seed=2))
    part = evidence(held, image[:, :1], text[:, :1], 10, seed=2)
    assert torch.allclose(part, found[:, :1], atol=1e-4), "whatever else is asked for"


def test_hubs_stand_back_by_brute_force():
    held = encoded(real().eval(), data().held(30))
    scores = held.features @ held.texts.features.T
    for way, s in (("i2t", scores), ("t2i", scores.T)):
        adjusted = s - s.topk(10, 0).values.mean(0) / 2
        order = adjusted.argsort(1, descending=True)
        found = retrieval.csls(held, 6)[way]
        assert torch.equal(found.order, order[:, :6])
        right = held.ids[order] == held.ids[:, None]
        assert torch.equal(found.ranks, right.int().argmax(1)), "nothing ties"
        query, answer = torch.arange(30)[:, None].expand(30, 6), found.order
        image, text = (query, answer) if way == "i2t" else (answer, query)
        row = ("i2t", "t2i").index(way)
        near = retrieval.contrast(
            held, torch.stack([image] * 2), torch.stack([text] * 2), torch.tensor(3.0), hubs=False
        )
        assert torch.allclose(near[row], 3 * adjusted.gather(1, answer), atol=1e-5)


def test_candidates_are_scored_by_contrast_without_hubs_and_words(monkeypatch):
    samples = data().held(30)
    asked = []

    def words(held, image, text, others, seed):
        asked.append((image, text, others))
        return torch.where(image[0] == text[0], 1e6, 0.0).expand_as(image)

    monkeypatch.setattr(judge, "evidence", words)
    found = judged(real(), samples, WANTED, ("itc", "itm", "mlm"))
    (image, text, others) = asked[0]
    first = found.rankings["csls"]
    assert others == 8 and torch.equal(text[0], first["i2t"].order[:, :4])
    assert torch.equal(image[1], first["t2i"].order[:, :4])
    among = (text[0] == torch.arange(30)[:, None]).any(1)
    assert among.any() and (found.rankings["evidence"]["i2t"].ranks[among] == 0).all(), "words decide"
    monkeypatch.setattr(judge, "WEIGHT", 0.0)
    level = judged(real(), samples, WANTED, ("itc", "itm", "mlm")).rankings["evidence"]["i2t"]
    assert torch.equal(level.order, first["i2t"].order[:, :4]), "without words the order is that of CSLS"


def test_words_find_what_features_forgot():
    """Features of some samples are lost, their words are not: the candidates' order is that of the words."""
    samples = []
    for sample in data().held(40):  # a caption that begins another one fits that one's picture as well
        if not any(a.caption.startswith(b.caption) for s in samples for a, b in ((s, sample), (sample, s))):
            samples.append(sample)
    samples = samples[:8]

    class Forgetful(Oracle):
        def _features(self, numbers):
            return torch.ones(len(numbers), 4) / 2

    model = Forgetful(samples)
    wanted = replace(CONFIG, evaluation=EvaluationConfig(rerank=8, evidence=64))
    found = judged(model, samples, wanted, ("itc", "mlm")).figures
    assert found["retrieval/i2t_r1"] == found["retrieval/t2i_r1"] == 0, "all are level"
    assert found["evidence/i2t_r1"] == found["evidence/t2i_r1"] == 100


@pytest.mark.parametrize(
    ("tasks", "there"),
    [(("itc", "mlm"), True), (("itc", "itm", "mlm"), True), (("itc", "itm"), False), (("mlm",), False)],
)
def test_there_is_evidence_where_there_are_masked_words_and_it_is_wanted(tasks, there):
    samples = data().held(12)
    figures = judged(real(), samples, WANTED, tasks).figures
    assert {name for name in figures if name.startswith("evidence")} == (FIGURES if there else set())
    assert not any(name.startswith("evidence") for name in judged(real(), samples, CONFIG, tasks).figures)


def test_evidence_of_odd_captions_is_finite():
    samples = data().held(4)
    odd = [samples[0], replace(samples[1], caption=""), replace(samples[2], caption="gramastar"), samples[3]]
    held = encoded(real().eval(), odd)
    own = torch.arange(4)
    found = evidence(held, own, own, 4, seed=0)
    assert found.isfinite().all() and found[[1, 2]].tolist() == [0, 0], "no known words, no evidence"
    assert evidence(encoded(real().eval(), odd[:1]), own[:1], own[:1], 2, seed=0) == 0, "one picture is like itself"


def test_options_below_nought_are_refused():
    with pytest.raises(ValueError, match=r"evaluation\.evidence"):
        EvaluationConfig(evidence=-1)
    with pytest.raises(ValueError, match=r"evaluation\.evidence: got 8 beside rerank=0"):
        EvaluationConfig(evidence=8, rerank=0)
    with pytest.raises(ValueError, match=r"evaluation\.rerank"):
        EvaluationConfig(rerank=-1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--evaluation.evidence", "-1"], "evaluation.evidence: got -1, wanted at least 0"),
        (["--model.fusion.layers", "-1"], "fusion.layers: got -1, wanted at least 0"),
    ],
)
def test_a_wrong_value_ends_the_command_in_one_line(capsys, given, said):
    with pytest.raises(SystemExit) as ended:
        parse(given)
    assert ended.value.code == 2 and capsys.readouterr().err == f"fastvlm-train: {said}\n"
