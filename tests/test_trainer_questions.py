"""Questions that are answered by a choice among all answers of the training questions."""

import json
from dataclasses import replace

import pytest
import torch
from evaluation_cases import CONFIG, SMALL, data
from trainer_cases import config, same, train, weights

from fastvlm_loss.trainer.build import model_of
from fastvlm_loss.trainer.checkpoint import CheckpointError
from fastvlm_loss.trainer.config import QuestionConfig
from fastvlm_loss.trainer.evaluation import evaluate
from fastvlm_loss.trainer.evaluation.held import encode
from fastvlm_loss.trainer.evaluation.questions import questions, some_answers
from fastvlm_loss.trainer.model import VLPretrainModel
from fastvlm_loss.trainer.reading import Reading
from fastvlm_loss.trainer.run import Run
from fastvlm_loss.trainer.world import World

CPU = torch.device("cpu")
CHOICE = QuestionConfig("classification")


def test_the_loss_is_a_sigmoid_for_each_answer():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7], [2.0, 2.0, 2.0]], requires_grad=True)
    reading = Reading(replace(CONFIG, vqa=CHOICE), lambda part, fused: logits, World(CPU), 0)
    question = {"choice": torch.tensor([2, -1, 0]), "weight": torch.tensor([1.0, 1.0, 0.0])}
    loss = reading({"question": torch.zeros(3, 4, 8)}, None, None, question, None)["vqa"]
    target = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    want = -(target * logits[:2].sigmoid().log() + (1 - target) * (-logits[:2]).sigmoid().log()).sum() / 3
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert logits.grad[2].tolist() == [0, 0, 0], "a sample without a question"


def test_a_batch_knows_the_place_of_each_answer():
    some = data()
    asked = [("is there a circle ?", answer) for answer in (some.answers[3], some.answers[3].upper(), "unheard of")]
    assert some.collate.question([*asked, None])["choice"].tolist() == [3, 3, -1, -1], "in small letters or large ones"


def test_an_answer_does_not_see_itself():
    """The logits depend on the question alone, whatever answer stands behind it."""
    some = data()
    torch.manual_seed(0)
    model = VLPretrainModel(replace(SMALL, answers=tuple(some.answers)), some.tokenizer).eval()
    batch = some.collate.question([("what colour is the circle ?", answer) for answer in some.answers[:4]])
    hidden = model("text", batch["tokens"], batch["mask"], batch["prompt_lengths"])["hidden"]
    seen = torch.randn(1, 5, 32).expand(4, -1, -1)
    logits = model("answers", model("fuse", hidden, batch["mask"], seen, batch["prompt_lengths"]))
    assert logits.shape == (4, len(some.answers)) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))


def test_it_learns_is_judged_and_resumes(tmp_path):
    chosen = {"vqa": CHOICE, "weights": {"vqa": 1.0}, "steps": 40}
    run = train(config(tmp_path / "whole", **chosen))
    raw = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["raw"]["vqa"] for line in raw if "raw" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert run.source.config.answers == tuple(run.data.answers)
    learns = {name for name, p in run.source.named_parameters() if p.requires_grad and name.startswith("heads.")}
    assert learns and all(name.startswith("heads.answers.") for name in learns)
    figures = run.evaluate().figures
    assert set(figures) == {"vqa/accuracy", "vqa/majority"}

    stopped = Run(config(tmp_path / "parts", **chosen), World(CPU))
    assert stopped.train(lambda: stopped.step == 7) is None
    again = train(config(tmp_path / "parts", resume="auto", **chosen))
    assert same(weights(again), weights(run))
    loaded = VLPretrainModel.load(next((tmp_path / "whole").glob("step_*")))
    assert loaded.config.answers == run.source.config.answers, "a checkpoint knows what its logits mean"


def test_accuracy_is_the_share_of_right_choices():
    some, samples = data(), data().held(12)
    torch.manual_seed(0)
    model = VLPretrainModel(replace(SMALL, answers=tuple(some.answers)), some.tokenizer).eval()
    with torch.no_grad():
        model.heads["answers"][3].weight.zero_()
        model.heads["answers"][3].bias[some.answers.index("red")] = 9.0
        held = encode(model, some.tokenizer, some.collate, samples, CPU)
        found = questions(held, some.answers)
        shown = some_answers(held, torch.arange(3), some.answers)
    asked = [answer for sample in samples for _, answer in sample.questions]
    assert found["vqa/accuracy"] == pytest.approx(100 * asked.count("red") / len(asked))
    assert {answer.given for answer in shown} == {"red"}
    judged = evaluate(model, some.tokenizer, samples, replace(CONFIG, vqa=CHOICE), CPU, "fp32", ("vqa",))
    assert judged.figures == found


def test_a_model_without_answers_says_so():
    model = VLPretrainModel(SMALL, data().tokenizer)
    with pytest.raises(ValueError, match="part: got 'answers', wanted a model with answers to choose from"):
        model("answers", torch.zeros(2, 3, 32))


def test_a_run_does_not_go_on_with_other_answers(tmp_path):
    """The logits of a checkpoint stand for its answers, whatever the data says today."""
    made = config(tmp_path, vqa=CHOICE, weights={"vqa": 1.0})
    run = Run(made, World(CPU))
    assert run.train(lambda: run.step == 2) is None
    path = next(tmp_path.glob("step_*"))
    for answers, message in (
        (run.data.answers[:-1], f"got None, wanted '{run.data.answers[-1]}'"),
        (["a", *run.data.answers[1:]], f"got 'a', wanted '{run.data.answers[0]}'"),
    ):
        with pytest.raises(CheckpointError, match=f"data.sources: got {len(answers)} answers .*{message}"):
            model_of(made, replace(run.data, answers=answers), path)


def test_answers_of_a_configuration_are_refused(tmp_path):
    small = config(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.answers: got 2, wanted none"):
        Run(replace(small, model=replace(small.model, answers=("a", "b"))), World(CPU))
    with pytest.raises(ValueError, match="answers: got a, a, wanted each once"):
        replace(SMALL, answers=("a", "a"))
