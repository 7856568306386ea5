"""The ablations: each variant is a configuration that parses, and a table is made of what runs have logged."""

import json

import pytest

from benchmarks import ablations, readme
from benchmarks.ablations import EXPERIMENTS, ROOT, markdown, trained
from fastvlm_loss.trainer.cli import parse
from fastvlm_loss.trainer.stages import stages_of

VARIANTS = [(name, variant) for name, e in EXPERIMENTS.items() for variant in e.variants]


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=["-".join(pair) for pair in VARIANTS])
def test_every_variant_is_a_run(name, variant):
    experiment = EXPERIMENTS[name]
    config = ["--config", str(ROOT / "configs" / experiment.config)]
    usual, made = (parse([*config, *more]).config for more in ((), experiment.variants[variant]))
    stages_of(made)
    assert (made == usual) == (not experiment.variants[variant]), "a variant differs from the usual run"


def test_runs_are_trained_once_and_read_from_their_logs(tmp_path, monkeypatch):
    def train(command, **_):
        folder = command[command.index("--output") + 1]
        seed = int(command[command.index("--seed") + 1])
        lines = [
            {"step": 0, "raw": {"itc": 1.0}, "seconds": 2.0},
            {"step": 1, "evaluation": {"retrieval/r10": 40 + seed}},
        ]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / folder / "report.html").write_text("")
        calls.append(seed)
        return type("Done", (), {"returncode": 0})

    calls = []
    monkeypatch.setattr(ablations.subprocess, "run", train)
    runs = [trained("real", "ITC alone", seed, [], tmp_path) for seed in (0, 2, 0)]
    assert calls == [0, 2], "a run that is there is not trained again"
    for name, variant in (("masking", "objects"), ("weighting", "fixed"), ("masking", "baseline")):
        trained(name, variant, 1, [], tmp_path)
    assert calls == [0, 2, 1, 1], "nor is the usual run for another experiment"
    result = {
        "experiment": "real", "date": "2026-01-01", "hardware": {"cpu": "CPU", "cores": 2, "instruction_set": "avx2"},
        "versions": dict.fromkeys(("python", "fastvlm_loss", "torch", "commit"), "1"), "runs": {"ITC alone": runs[:2]},
        "arguments": ["--threads", "1"], "beside": "beside other work",
    }  # fmt: skip
    assert "| ITC alone | 41.0 ± 1.4 |" in markdown(result)
    assert "`python -m benchmarks.ablations real --threads 1`, beside other work. CPU" in markdown(result)
    assert markdown(result).splitlines()[2] == "|  | R@10 |", "what no run has is no column"


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
    with pytest.raises(RuntimeError, match="negatives: the run of 'random' with seed 1 failed"):
        trained("negatives", "random", 1, [], tmp_path)


def test_the_readme_has_every_saved_result():
    text = readme.README.read_text()
    assert text == readme.splice(text, ablations.block(), *readme.TRAINER), "run: python -m benchmarks readme"
