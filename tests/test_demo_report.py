"""Recall, the report, the command line, and a Ctrl-C in the middle of training."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("open_clip", exc_type=Exception)
pytest.importorskip("matplotlib")

from fastvlm_loss.data import shapes
from fastvlm_loss.demo import __main__ as demo
from fastvlm_loss.demo import cost, figures, report
from fastvlm_loss.demo.augment import augment
from fastvlm_loss.demo.evaluation import Retrieval, chance, in_batch_accuracy, ranks, retrieval, table
from fastvlm_loss.demo.options import Config, parse

PNG = b"\x89PNG\r\n\x1a\n"


def test_perfect_features_have_full_recall_and_constant_ones_none():
    eye, ids = torch.eye(30), torch.arange(30)
    assert retrieval(eye, eye, ids).image_to_text == (100, 100, 100)
    flat = torch.ones(30, 4)
    assert retrieval(flat, flat, ids).text_to_image == (0, 0, 0), "ties count against"
    assert retrieval(flat * torch.nan, flat, ids).image_to_text == (0, 0, 0), "so do NaNs"


def test_ranks_against_sorting(monkeypatch):
    from fastvlm_loss.demo import evaluation

    monkeypatch.setattr(evaluation, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2, 40, 5, generator=generator)
    ids = torch.randint(0, 25, (40,), generator=generator)
    order = (queries @ gallery.T).argsort(1, descending=True)
    wanted = []
    for i in range(40):
        right = (ids[order[i]] == ids[i]).tolist()
        wanted.append(right.index(True))
    assert ranks(queries, gallery, ids).tolist() == wanted


def test_chance_is_the_mean_over_random_orders():
    assert chance(torch.ones(1000, dtype=torch.int64), 1000) == pytest.approx((0.1, 0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 0, 0, 1, 1, *range(2, 17)])
    equal = torch.tensor([3, 3, 3, 2, 2, *[1] * 15])
    hits = torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        right = ids[torch.randperm(20, generator=generator)][None, :] == ids[:, None]
        hits += torch.tensor([right[:, :k].any(1).double().mean() for k in (1, 5, 10)])
    assert (100 * hits / 4000).tolist() == pytest.approx(chance(equal, 20), abs=0.8)


def test_in_batch_accuracy_takes_any_equal_caption():
    features = torch.eye(4)
    assert in_batch_accuracy(features, features, torch.arange(4)) == 1
    swapped = features[[1, 0, 2, 3]]
    assert in_batch_accuracy(features, swapped, torch.arange(4)) == 0.5
    assert in_batch_accuracy(features, swapped, torch.tensor([5, 5, 2, 3])) == 1


def test_table_shows_both_ways_and_chance():
    text = table(Retrieval((50.0, 80.0, 90.5), (49.0, 79.0, 89.0), (0.1, 0.5, 1.0), 1000))
    assert "1,000" in text and "90.5" in text and "chance" in text and len(text.splitlines()) == 4


def test_augmentation_depends_on_seed_and_step_only():
    images = shapes.load(train=8, test=1, size=32).train.images[torch.arange(8)]
    once, again, other = augment(images, 0, 3), augment(images, 0, 3), augment(images, 0, 4)
    assert once.shape == images.shape and once.dtype == torch.uint8
    assert torch.equal(once, again) and not torch.equal(once, other) and not torch.equal(once, images)
    assert (once.float() - images.float()).abs().mean() < 60


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    test = shapes.load(train=1, test=40, size=32).test
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(images + 0.4 * torch.randn(40, 16, generator=generator), dim=-1)
    curves = {"loss": [5.0, 4.0, 3.0], "accuracy": [0.1, 0.2, 0.5], "scale": [14.0, 14.1, 14.2]}
    measured = cost.measure(torch.device("cpu"), sizes=(64, 2048), dim=32)
    recall = retrieval(images, texts, test.ids)
    sheet = figures.sheet(test, images, texts)
    made = report.draw("a <b>summary</b>", "shapes", curves, recall, measured, sheet, 32)
    return made.write(tmp_path_factory.mktemp("report")), measured


def test_report_is_one_self_contained_page(written):
    page = written[0].read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,iVBOR") == 3
    words = re.sub(r"base64,[\w+/=]+", "", page)  # in which every four letters stand sooner or later
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in words
    assert "a &lt;b&gt;summary&lt;/b&gt;" in page and "R@10" in page and "2,048" in page
    names = sorted(path.name for path in written[0].parent.iterdir())
    assert names == ["cost.png", "curves.png", "report.html", "sheet.png"]
    assert all((written[0].parent / name).read_bytes().startswith(PNG) for name in names if name.endswith("png"))


def test_cost_measures_both_losses(written):
    measured = written[1]
    for values in (measured.seconds, measured.megabytes):
        assert set(values) == {"fastvlm", "dense"} and all(len(series) == 2 for series in values.values())
    assert all(value > 0 for series in measured.seconds.values() for value in series)
    scores = 2048 * 2048 * 4 / 1e6
    assert measured.megabytes["dense"][1] >= scores, "dense holds at least the score matrix"
    assert measured.megabytes["fastvlm"][1] < measured.megabytes["dense"][1]


def test_sheet_shows_good_and_bad_queries_alike():
    chosen = figures.spread(torch.arange(100).flip(0), 4)
    assert chosen == [87, 62, 37, 12]


def test_defaults():
    options = parse([])
    assert options.config == Config("emoji", 0, 256, "fastvlm", 1e-3, 0, 48) and str(options.output) == "runs/emoji"
    assert options.config.with_data("emoji").steps == 300 and options.config.with_data("shapes").steps == 150
    assert parse(["--data", "shapes", "--steps", "7"]).config.with_data("shapes").steps == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: got 0, wanted a whole number from 1"),
        (["--batch-size", "1"], "--batch-size: got 1, wanted a whole number from 2"),
        (["--lr", "-1"], "--lr: got -1, wanted a number above 0"),
        (["--lr", "nan"], "--lr: got nan, wanted a number above 0"),
        (["--size", "50"], "--size: got 50, wanted a multiple of 16"),
        (["--seed", "x"], "--seed: got x, wanted a whole number from 0"),
        (["--threads", "0"], "--threads: got 0, wanted a whole number from 1"),
        (["--loss", "siglip"], "--loss: invalid choice: 'siglip'"),
        (["--data", "/no/such"], "--data: got /no/such, which does not exist"),
        (["--resume", "/no/such"], "--resume: got /no/such, which is no checkpoint"),
        (["--output", __file__], "where a file is in the way"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_options_end_with_one_line_before_any_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as end:
        demo.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1


def test_options_beside_resume_are_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        parse(["--resume", str(tmp_path), "--lr", "1", "--batch-size", "8"])
    assert "--batch-size, --lr: given with --resume" in capsys.readouterr().err
    assert parse(["--resume", str(tmp_path)]).output == tmp_path


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    for option in ["data", "steps", "batch-size", "loss", "lr", "seed", "size", "output", "resume", "threads"]:
        assert f"--{option}" in said


def test_unusable_data_ends_with_status_1_and_one_line(tmp_path, capsys):
    assert demo.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "with no usable pair" in capsys.readouterr().err
    assert demo.main(["--data", "shapes", "--batch-size", "50000", "--output", str(tmp_path / "out")]) == 1
    assert "--batch-size: got 50000, wanted at most 40000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module in ("PIL", "tqdm") else True)
    assert demo.main(["--data", "shapes"]) == 1
    assert "packages are missing: pip install pillow tqdm" in capsys.readouterr().err


def test_the_whole_demo_trains_reports_and_resumes(tmp_path, capsys, monkeypatch, written):
    monkeypatch.setattr(cost, "measure", lambda device: written[1])
    arguments = ["--data", "shapes", "--steps", "3", "--batch-size", "8", "--size", "16", "--output", str(tmp_path)]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    assert "image -> text" in said and "chance" in said and str(tmp_path / "report.html") in said
    assert "3 steps of 8, 16 pixels, loss fastvlm, seed 0" in (tmp_path / "report.html").read_text(encoding="utf-8")
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert demo.main(["--resume", str(tmp_path)]) == 0, "a finished run only tests and reports again"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["curves"] == before["curves"]
    assert capsys.readouterr().out.splitlines()[1:6] == said.splitlines()[1:6], "the same table"


def test_ctrl_c_keeps_a_checkpoint_that_resumes(tmp_path):
    command = [sys.executable, "-m", "fastvlm_loss.demo"]
    start = [*command, "--data", "shapes", "--steps", "5000", "--batch-size", "8", "--size", "16", "--output", tmp_path]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        seen = ""
        deadline = time.monotonic() + 120
        while "training:" not in seen:  # the bar appears when the signal's handler stands
            assert run.stderr is not None and run.poll() is None and time.monotonic() < deadline, seen
            seen += run.stderr.read(1)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    resume = f"python -m fastvlm_loss.demo --resume {tmp_path / 'checkpoint.pt'}"
    assert re.search("Stopped after step [1-9]", out) and resume in out
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 5000 and len(state["curves"]["loss"]) == state["step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]
