"""The report: one page that needs nothing beside it, from a log alone or with the examples of an evaluation."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from evaluation_cases import CONFIG, CPU, Oracle, data, judged, real
from PIL import Image

from fastvlm_loss.trainer import report
from fastvlm_loss.trainer.config import CheckpointConfig, ContrastiveConfig, StageConfig
from fastvlm_loss.trainer.evaluation.looking import Look
from fastvlm_loss.trainer.report import __main__ as command
from fastvlm_loss.trainer.report import curves, examples
from fastvlm_loss.trainer.run import Run
from fastvlm_loss.trainer.world import World

FIGURES = {
    "retrieval/r10": 40.0,
    "retrieval/chance_r10": 1.0,
    "vqa/accuracy": 70.0,
    "vqa/majority": 42.9,
    "own/one": 3.0,
}


def line(step, stage, **raw):
    metrics = {"learning_rate": 1e-3, "logit_scale": 14.0, "gradient_norm": 1.0 + step, "accuracy": 0.5}
    weighted = {task: 0.5 * value for task, value in raw.items()}
    return {"step": step, "raw": raw, "weighted": weighted, "metrics": metrics, "skipped": step == 3, "stage": stage,
            "seconds": 0.25}  # fmt: skip


def log(folder, extra=()):
    lines = [line(s, "contrast", itc=5.0 - 0.1 * s) for s in range(4)]
    lines += [line(s, "all <i>", itc=4.0, itm=0.7, caption=float("nan")) for s in range(4, 9)]
    lines += [{"step": s, "evaluation": {**FIGURES, "retrieval/r10": 10.0 * s}} for s in (4, 9)]
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(part) + "\n" for part in [*lines, *extra]) + '{"step": 9, "ra')
    return folder


def text_of(page):
    return re.sub(r"data:image/png;base64,[^\"]+", "PNG", page)


def alone(page):
    """Nothing is fetched, every picture is whole."""
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in text_of(page)
    pictures = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    for png in pictures:
        Image.open(io.BytesIO(png)).verify()
    return len(pictures)


@pytest.fixture(scope="module")
def evaluation():
    samples = data().held(20)
    return judged(Oracle(samples, (3, 7)), samples)


def test_a_log_alone_gives_curves_and_the_last_figures(tmp_path):
    assert command.main([str(log(tmp_path / "some run")), "--log-only"]) == 0
    path = tmp_path / "some run" / "report.html"
    page = path.read_text(encoding="utf-8")
    assert alone(page) == 3
    said = text_of(page)
    assert "Training run some run" in said and "9 steps, 250 ms a step" in said and "1 skipped" in said
    assert "contrast: steps 0 to 3; all &lt;i&gt;: steps 4 to 8" in said
    assert "42.9 the usual answer" in said and "own/one" in said, "a figure without a title keeps its name"
    assert "Configuration" not in said and "What it finds" not in said
    assert sorted(p.name for p in path.parent.iterdir()) == ["log.jsonl", "report.html"], "no part is left"


def test_an_evaluation_adds_sheets_and_examples(tmp_path, evaluation):
    page = report.write(log(tmp_path / "run"), evaluation).read_text(encoding="utf-8")
    said = text_of(page)
    for title in ("What it finds", "Negatives", "Captions", "Questions", "image to text, re-ranked", "hardness ∞"):
        assert title in said
    assert alone(page) == 5 + 8 + 8 + len(evaluation.answers), "curves and sheets; negatives, captions, answers"
    assert {3, 7} & {answer.sample for answer in evaluation.answers} == {3}
    assert (said.count('class="right"'), said.count('class="wrong"')) == (len(evaluation.answers) - 1, 1)
    assert "<td>95.0</td><td>50.0 chance</td>" in said


def test_the_attention_of_the_trainers_model_is_shown(tmp_path):
    found = judged(real().eval(), data().held(10), tasks=("mlm",))
    page = report.write(log(tmp_path / "run"), found).read_text(encoding="utf-8")
    assert len(found.looks) == 8 and alone(page) == 3 + 16
    assert "[MASK]" in page and "times the mean" in page and "Where a hidden word looks" in page


def test_an_evaluation_of_nothing_still_gives_a_page(tmp_path):
    page = report.write(log(tmp_path / "run"), judged(real(), [])).read_text(encoding="utf-8")
    assert alone(page) == 3 and "On pairs never trained on" not in page


def test_captions_cannot_break_the_page(tmp_path):
    odd = [replace(s, caption=f"<script>{i}</script> & \"'") for i, s in enumerate(data().held(4))]
    found = judged(real().eval(), odd, tasks=("mlm", "caption"))
    page = report.write(log(tmp_path / "run"), found).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;2&lt;/script&gt; &amp;" in page


def test_no_log_is_an_error_with_status_1(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"folder: got .*, which has no log of a run"):
        report.write(tmp_path)
    assert command.main([str(tmp_path)]) == 1
    assert "which has no log of a run" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_the_command_evaluates_the_newest_checkpoint_as_the_run_did(tmp_path, capsys):
    points = [(0.0, 1.0), (1.0, 0.5)]
    stages = (StageConfig("a", 0.5, {"mlm": 1.0}), StageConfig("b", 0.5, {"mlm": points, "caption": 1.0}))
    config = replace(
        CONFIG, output=str(tmp_path / "run"), steps=2, stages=stages, precision="fp32", tensorboard=False,
        checkpoint=CheckpointConfig(every=1), evaluation=replace(CONFIG.evaluation, limit=12),
        itc=ContrastiveConfig(options={"label_smoothing": 0.1}),
    )  # fmt: skip
    first = Run(config, World(CPU)).train()
    wanted = report.write(config.output, first).read_text(encoding="utf-8")
    assert command.config_of(json.loads(json.dumps(asdict(config)))) == config
    (tmp_path / "run" / "report.html").unlink()
    assert command.main([config.output]) == 0
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == wanted
    assert "label_smoothing" in wanted and "Trained with fastvlm_loss" in wanted and "8 pairs a step" in wanted
    for path in (tmp_path / "run").glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert command.main([config.output]) == 0, "without a whole checkpoint there are the curves"
    said = capsys.readouterr()
    assert "the checkpoint cannot be evaluated" in said.err and "damaged" in said.err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Training</h2>" in page and "<h2>Captions</h2>" not in page


def test_bands_are_the_stages_in_order():
    steps = [line(s, name) for s, name in enumerate("aabbba")]
    assert curves.bands(steps) == [("a", 0, 1), ("b", 2, 4), ("a", 5, 5)]


def test_no_curves_without_steps_and_none_of_figures_before_two_evaluations():
    assert curves.losses([]) is None and curves.course([]) is None
    assert curves.judged([line(0, "a", itc=1.0)], [{"step": 1, "evaluation": FIGURES}]) is None


def test_heat_is_warm_where_the_attention_is():
    flat = torch.full((4, 4), 1 / 16)
    sharp = torch.zeros(4, 4)
    sharp[1, 2] = 1
    grey = np.full((64, 64, 3), 128, np.uint8)
    even, spot = (examples.warmed(grey, Look(0, "", "", "", heat)).astype(int).sum(2) for heat in (flat, sharp))
    assert np.ptp(even) == 0, "even attention looks even"
    assert np.unravel_index(spot.argmax(), spot.shape)[0] in range(16, 32) and spot[24, 40] > even[0, 0] > spot[60, 4]
