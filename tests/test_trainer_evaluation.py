"""Evaluation: with a model that knows the answers every figure is known; nothing is left changed; odd inputs work."""

from dataclasses import replace

import pytest
import torch
from evaluation_cases import CONFIG, TASKS, Oracle, data, judged, real

from fastvlm_loss.trainer.config import EvaluationConfig

RETRIEVAL = {f"retrieval/chance_r{k}" for k in (1, 5, 10)}
for kind in ("retrieval", "csls"):
    RETRIEVAL |= {f"{kind}/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {f"{kind}/r10"}
FIGURES = {
    "itc": RETRIEVAL | {"zeroshot/accuracy", "zeroshot/colour", "zeroshot/shape", "zeroshot/chance"},
    "itm": {"itm/accuracy_hard", "itm/accuracy_distractors"},
    "mlm": {"mlm/accuracy", "mlm/accuracy_blind", "mlm/gain"},
    "caption": {"caption/exact", "caption/token_accuracy"},
    "vqa": {"vqa/accuracy", "vqa/majority"},
}
RERANK = {f"rerank/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"rerank/r10"}


@pytest.fixture(scope="module")
def held():
    """Samples of which some have one object, and one picture is there twice under the same caption."""
    samples = data().held(28)
    assert any(len(s.objects) == 1 for s in samples)
    return [*samples, replace(samples[3], index=samples[3].index + 1, image=255 - samples[3].image)]


def test_a_model_that_knows_all_has_full_marks(held):
    found = judged(Oracle(held), held).figures
    best = {name for name in found if "chance" not in name and name not in ("mlm/accuracy_blind", "vqa/majority")}
    assert {name: found[name] for name in best} == dict.fromkeys(best, 100.0), "equal captions are equally right"
    assert found["mlm/accuracy_blind"] == 0 and found["retrieval/chance_r1"] == pytest.approx(100 * 31 / 29 / 29)


def test_what_is_forgotten_is_missing_from_the_figures(held):
    forgotten = range(0, 28, 4)
    found = judged(Oracle(held, forgotten), held).figures
    share, count = 1 - len(forgotten) / len(held), len(held)
    assert found["mlm/accuracy"] == found["caption/exact"] == pytest.approx(100 * share)
    asked = [(i, question) for i, sample in enumerate(held) for question in sample.questions]
    assert found["vqa/accuracy"] == pytest.approx(100 * sum(i not in forgotten for i, _ in asked) / len(asked))
    tokens = [len(caption) - 1 for caption in Oracle(held).captions]
    right = sum(n for i, n in enumerate(tokens) if i not in forgotten)
    assert found["caption/token_accuracy"] == pytest.approx(100 * right / sum(tokens))
    assert found["itm/accuracy_hard"] == pytest.approx(50 * share + 50), "all wrong pairs are refused"
    told = [(i, d) for i, sample in enumerate(held) for d in sample.distractors]
    known = sum(i not in forgotten for i, _ in told)
    assert found["itm/accuracy_distractors"] == pytest.approx(100 * known / len(told)), "a tie counts against"
    assert found["retrieval/i2t_r1"] == found["rerank/i2t_r1"] == pytest.approx(100 * share)
    assert count == len(judged(Oracle(held), held).ids)


def test_the_gain_is_what_the_picture_adds_to_guessing(held):
    guess = data().tokenizer.encode("star").tokens[0]
    found = judged(Oracle(held, blind_guess=guess), held, tasks=("mlm",)).figures
    assert 0 < found["mlm/accuracy_blind"] < 60
    assert found["mlm/gain"] == pytest.approx(100 - found["mlm/accuracy_blind"])


@pytest.mark.parametrize("task", TASKS)
def test_there_are_figures_of_the_objectives_alone(held, task):
    assert set(judged(real(), held, tasks=(task,)).figures) == FIGURES[task]


def test_a_new_model_is_near_chance_and_figures_are_shares_of_hundred(held):
    found = judged(real(), held)
    assert set(found.figures) == set.union(*FIGURES.values(), RERANK)
    values = {name: value for name, value in found.figures.items() if name != "mlm/gain"}
    assert all(0 <= value <= 100 for value in values.values())
    assert found.figures["caption/exact"] == 0 and found.figures["retrieval/i2t_r1"] < 40


def test_twice_the_same_and_nothing_is_left_behind(held):
    model = Oracle(held, (1, 5))
    model.train()
    model.part.eval()  # frozen
    state = torch.get_rng_state()
    once, twice = (judged(model, held) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.part.training
    assert once.figures == twice.figures and once.captions == twice.captions and once.answers == twice.answers
    assert all(torch.equal(once.picks.texts[b], twice.picks.texts[b]) for b in once.picks.texts)


def test_pictures_and_captions_are_encoded_once(held):
    model = Oracle(held)
    judged(model, held, tasks=("itc", "itm"))
    assert model.calls.count("image") == 1, "29 pictures"
    assert model.calls.count("text") == 4, "captions, 512 prompts of the classes, distractors"


def test_the_mode_comes_back_after_an_error(held):
    model = real().train()
    with pytest.raises(ValueError, match="wanted a model with fusion"):
        judged(_without_fusion(), held, tasks=("itm",))
    with pytest.raises(ValueError, match="images"):
        judged(model, [replace(held[0], image=held[0].image[:8])])
    assert model.training
    model.eval()


def test_nothing_held_out_gives_no_figures():
    found = judged(real(), [])
    assert found.figures == {} and found.table() == "nothing was held out to evaluate on"


def test_one_pair(held):
    found = judged(Oracle(held), held[:1])
    assert found.figures["retrieval/i2t_r1"] == found.figures["rerank/t2i_r10"] == 100
    assert "itm/accuracy_hard" not in found.figures, "there is no wrong pair"
    assert found.figures["vqa/accuracy"] == found.figures["caption/exact"] == 100
    assert (found.picks.texts[1.0] == -1).all()


def test_no_questions_distractors_or_objects(held):
    plain = [replace(s, questions=(), distractors=(), objects=(), attributes=()) for s in held]
    found = judged(Oracle(plain), plain)
    gone = {"vqa/accuracy", "vqa/majority", "itm/accuracy_distractors"} | {n for n in FIGURES["itc"] if "zeroshot" in n}
    assert set(found.figures) == set.union(*FIGURES.values(), RERANK) - gone and found.answers == []
    assert found.figures["mlm/accuracy"] == 100, "a content word is hidden where no object is named"


def test_all_captions_equal(held):
    same = [replace(held[0], index=i) for i in range(6)]
    found = judged(real(), same, tasks=("itc", "itm"))
    assert found.figures["retrieval/i2t_r1"] == found.figures["rerank/t2i_r1"] == 100
    assert found.figures["retrieval/chance_r1"] == pytest.approx(100)
    assert "itm/accuracy_hard" not in found.figures and (found.picks.texts[float("inf")] == -1).all()


def test_an_unknown_word_is_never_right(held):
    odd = [
        replace(s, caption="gramastar", objects=("gramastar",), questions=(("what is it", "xyzzy"),)) for s in held[:2]
    ]
    found = judged(Oracle(odd), odd, tasks=("mlm", "caption", "vqa")).figures
    assert found["caption/exact"] == found["vqa/accuracy"] == 0 and "mlm/accuracy" not in found
    assert found["caption/token_accuracy"] == 50, "[SEP] is"


def test_an_empty_caption_and_a_tokenizer_with_one_token_for_several_roles(held, monkeypatch):
    odd = [replace(s, caption="") for s in held[:3]]
    found = judged(real(), odd).figures
    assert "mlm/accuracy" not in found and found["retrieval/i2t_r1"] == 100
    monkeypatch.setattr(data().tokenizer, "unk_id", data().tokenizer.sep_id)
    monkeypatch.setattr(data().tokenizer, "pad_id", data().tokenizer.sep_id)
    assert judged(Oracle(held), held, tasks=("caption", "vqa")).figures["caption/exact"] == 100


def test_no_reranking_where_it_is_not_wanted(held):
    found = judged(real(), held, replace(CONFIG, evaluation=EvaluationConfig(rerank=0)), ("itc", "itm"))
    assert "rerank" not in found.rankings and not any(name.startswith("rerank") for name in found.figures)


def test_the_table_names_what_stands_beside(held):
    said = judged(Oracle(held), held).table()
    assert "recall (%) of 29" in said and "12.5 chance" in said and "0.0 without the picture" in said
    assert "the usual answer" in said and "image to text, re-ranked" in said


def _without_fusion():
    from fastvlm_loss.trainer.model import FusionConfig, VLPretrainModel

    return VLPretrainModel(replace(CONFIG.model, fusion=FusionConfig(layers=0)), data().tokenizer)
