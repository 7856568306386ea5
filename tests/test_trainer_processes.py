"""The trainer as a program: killed and resumed, in two processes, stopped by a signal, with bad arguments and data."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvlm_loss.trainer.progress import read

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = {
    "steps": 6,
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
    "weights": {
        "itc": 1.0,
        "itm": 1.0,
        "mlm": 1.0,
        "caption": 0.5,
        "vqa": 0.5,
        "multiscale": 0.5,
        "late_interaction": 0.5,
    },
    "data": {"sources": [{"path": "shapes", "samples": 200}], "size": 32, "questions": True, "augment": False},
    "model": {
        "image": {"size": 32, "widths": [8, 8, 16, 16]},
        "text": {"width": 32, "layers": 1, "heads": 2, "inner": 64, "positions": 32},
        "fusion": {"layers": 1},
        "embed_dim": 16,
        "local": ["multiscale", "late_interaction"],
    },
    "checkpoint": {"every": 1, "keep": 2},
    "evaluation": {"limit": 12, "rerank": 4, "evidence": 4},
    "optimizer": {"lr": 0.003},
}
TRAIN = [sys.executable, "-m", "fastvlm_loss.trainer"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def whole(file):
    """The run of one process that nothing disturbs."""
    one(file, file.parent / "whole")
    return file.parent / "whole"


def run(command, check=True):
    made = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=240)
    assert not check or made.returncode == 0, made.stderr[-3000:]
    return made


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def two(file, folder, *more):
    run([*TWO, port(), "-m", "fastvlm_loss.trainer", "--config", str(file), "--output", str(folder), *more])


def one(file, folder, *more, check=True):
    return run([*TRAIN, "--config", str(file), "--output", str(folder), *more], check)


def newest(folder):
    return load_file(sorted(Path(folder).glob("step_*"))[-1] / "model.safetensors")


def losses(folder):
    return [line["raw"] for line in read(Path(folder)) if "raw" in line]


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, file, whole):
    for step in (1, 3):
        arguments = [*TRAIN, "--config", str(file), "--output", str(tmp_path), "--resume", "auto"]
        process = subprocess.Popen(arguments, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / f"step_{step:08d}").exists():
            time.sleep(0.001)
        time.sleep(0.01 * step)  # somewhere in the next step, or while it is written
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was to be killed while it ran"
    one(file, tmp_path, "--resume", "auto")
    expected, found = newest(whole), newest(tmp_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one_which_resumes_what_they_saved(tmp_path, file, whole, strategy):
    arguments = ["--checkpoint.every", "3", "--checkpoint.keep", "9", "--strategy", strategy]
    two(file, tmp_path, *arguments)
    for alone, shared in zip(losses(whole), losses(tmp_path), strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-4)
    expected, found = newest(whole), newest(tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=5e-4, rtol=5e-3)
    shutil.rmtree(tmp_path / "step_00000006")
    one(file, tmp_path, "--resume", "auto", *arguments)
    assert losses(tmp_path)[3:] == [pytest.approx(raw, rel=1e-3, abs=1e-4) for raw in losses(whole)[3:]]


MOMENTUM = ["--momentum.enabled", "true", "--momentum.queue", "24", "--micro_batch", "5", "--mlm.strategy", "hard"]
# batches of 4 have shares whose longest texts differ
SHARDED = ["--strategy", "fsdp", "--batch_size", "4", "--weighting.kind", "uncertainty", "--vqa.kind", "classification"]


@pytest.mark.parametrize("more", [MOMENTUM, SHARDED], ids=["queues and micro-batches", "shards"])
def test_two_processes_go_through_stages_as_one_does(tmp_path, file, more):
    more = [*more, "--schedule", "30/50/20", "--checkpoint.every", "0", "--steps", "8"]
    one(file, tmp_path / "one", *more)
    two(file, tmp_path / "two", *more)
    for alone, shared in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_sigterm_saves_and_leaves_with_0(tmp_path, file):
    arguments = [
        *TRAIN,
        "--config",
        str(file),
        "--output",
        str(tmp_path / "r"),
        "--steps",
        "500",
        "--checkpoint.every",
        "0",
    ]
    process = subprocess.Popen(arguments, env=ENV, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    log = tmp_path / "r" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume auto goes on" in out
    (path,) = (tmp_path / "r").glob("step_*")
    assert int(path.name[5:]) == len(losses(tmp_path / "r"))


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--optimizer.lrr", "1"], 2, "optimizer.lr"),
        (["--precision", "bf17"], 2, "precision"),
        (["--schedule", "10/90"], 1, "schedule: got '10/90', wanted one of single"),
        (["--itc.loss", "clap_loss"], 1, "itc.loss: got 'clap_loss', wanted one of clip_loss"),
        (["--data.sources", "[{path: /nowhere}]"], 1, "/nowhere"),
    ],
    ids=["name", "value", "schedule", "loss", "data"],
)
def test_what_is_wrong_is_one_line(tmp_path, file, more, status, message):
    made = one(file, tmp_path / "r", *more, check=False)
    assert made.returncode == status
    assert made.stderr.count("\n") == 1 and message in made.stderr, made.stderr
    assert not (tmp_path / "r").exists()


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path, file):
    out = one(file, tmp_path / "r", "--schedule", "30/50/20", "--steps", "10", "--dry-run").stdout
    assert "stage contrast: steps 0 to 2" in out and "frozen: vision" in out and "200 training pairs" in out
    assert not (tmp_path / "r").exists()


def test_eval_prints_the_figures_of_the_newest_checkpoint(file, whole):
    assert "image to text" in one(file, whole, "--eval").stdout
