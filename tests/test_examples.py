"""The examples run as they are, and what they train gets better."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# cross-entropy of a head that looks at nothing and knows that one pair in three matches
BLIND = math.log(3) - 2 / 3 * math.log(2)


def run(name, *options):
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=EXAMPLES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def both():
    head, *rows = run("albef_step.py", "--steps", "60")
    assert head.split() == ["step", "usual", "contrastive", "matching", "ours", "contrastive", "matching"]
    return [[float(number) for number in row.split()] for row in rows]


def test_both_variants_of_the_albef_step_learn_to_match(both):
    assert [row[0] for row in both] == [0, 10, 20, 30, 40, 50]
    for contrastive, matching in ((1, 2), (3, 4)):
        first, last = both[0], both[-1]
        assert last[contrastive] < first[contrastive] / 3
        assert last[matching] < 0.9 * BLIND < first[matching]


def test_the_variants_begin_alike(both):
    # the same weights and pairs, another draw of the same law
    assert both[0][1] == pytest.approx(both[0][3], rel=0.02) and both[0][2] == pytest.approx(both[0][4], rel=0.05)


def test_the_two_lines_are_marked():
    assert len(re.findall(r"# <- the (?:first|second)", (EXAMPLES / "albef_step.py").read_text())) == 2


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"]({path.name})" in listed for path in EXAMPLES.glob("*.py"))


def test_the_distributed_step_is_that_of_one_process_and_learns():
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(EXAMPLES / "distributed_step.py"), "--check", "--steps", "40"]
    hidden = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=EXAMPLES.parent, env=hidden)
    assert done.returncode == 0, done.stderr[-2000:]
    said, *steps = done.stdout.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in steps]
    assert said == "loss and gradients are those of one process" and losses[-1] < 0.1 * losses[0]


def test_accelerate_trains_and_gradient_caching_is_the_batch_where_accumulation_is_not():
    losses = [float(line.rpartition(" ")[2]) for line in run("with_accelerate.py", "--cpu", "--steps", "21")]
    assert len(losses) == 3 and losses[-1] < 0.1 * losses[0]
    cached, accumulated = (float(line.split(": ")[1].split()[0]) for line in run("with_accelerate.py", "--check"))
    assert cached < 1e-5 and accumulated > 0.1


def test_the_hf_trainer_trains_with_the_step_of_a_whole_batch():
    *_, losses, right = run("with_hf_trainer.py", "--cpu", "--steps", "60", "--micro-batch", "16")
    losses = [float(loss) for loss in losses.partition(": ")[2].split()]
    before, after = (int(share) for share in re.findall(r"(\d+)% (?:before|after)", right))
    assert len(losses) == 6 and losses[-1] < 0.1 * losses[0] and before < 5 and after > 90


@pytest.mark.parametrize(
    "options", [[], ["--micro-batch", "8", "--devices", "2"]], ids=["one process", "two, micro-batches"]
)
def test_lightning_gives_the_curve_of_a_plain_loop_in_one_process(options):
    *steps, apart = run("with_lightning.py", "--cpu", "--check", "--steps", "31", *options)
    losses = [float(line.rpartition(" ")[2]) for line in steps if line.startswith("step")]
    assert len(losses) == 4 and losses[-1] < 0.1 * losses[0]
    assert float(apart.rpartition(": ")[2]) < 1e-5
