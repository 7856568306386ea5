"""The launch wrappers of the GPU backend on CPU tensors: what a GPU would compile and launch, without one."""

import pytest
import torch

pytest.importorskip("triton")

from fastvlm_loss.kernels import configs

from fastvlm_loss.backends import triton as backend
from fastvlm_loss.scores.statistics import Hinge, Softmax
from tools.devices import DEVICES
from tools.dryrun import dry_run
from tools.kernel_cases import problem, select, step, sweep

# what a pull request must not break; the others on demand
ARCHS = [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
by_arch = pytest.mark.parametrize("arch", ARCHS)
SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture
def small_tiles():
    """Tiles that compile fast, for what does not depend on them."""
    tile = configs.Tile(32, 32, 32, 32, warps=4, stages=2)
    with configs.use("forward", tile), configs.use("gradient", tile), configs.use("fused", tile):
        yield


def made(arch, call, *arguments, multiprocessors=None):
    """The launches of a call, each within the limits of the device."""
    with dry_run(arch, multiprocessors) as launches:
        call(*arguments)
    device = DEVICES[arch]
    for launch in launches:
        assert launch.kernel.metadata.shared <= device.shared_per_block
        assert launch.kernel.metadata.num_warps <= 32
        assert all(size >= 1 for size in launch.grid)
    return launches


def names(launches):
    return [launch.name for launch in launches]


def distinct(launches):
    return {launch.kernel.hash for launch in launches}


def ceil(a, b):
    return -(-a // b)


def sizes(launch):
    """Rows and columns of a launch's tiles."""
    return launch.constants["SHAPE"][:2]


def assert_asynchronous(launch, dtype):
    """Operands come by TMA where there is one, else by cp.async, in the dtype of the features."""
    ptx, kinds = launch.kernel.asm["ptx"], [launch.signature[name] for name in ("X", "Y", "PIECE")]
    if launch.arch >= 90:
        assert all(kind.startswith(f"tensordesc<{SUFFIX[dtype]}[") for kind in kinds)
        assert "cp.async.bulk.tensor.2d.shared" in ptx
    else:
        assert kinds == [f"*{SUFFIX[dtype]}"] * 3 and launch.aligned >= {"X", "Y", "PIECE"}
        assert "cp.async.cg" in ptx


def assert_covers(launches, m, n):
    """Every row block meets every tile of columns, and a merge every row and column."""
    for launch in launches:
        if launch.name == "merge":
            assert launch.grid in ((ceil(m, backend.MERGE_BLOCK), 1, 1), (ceil(n, backend.MERGE_BLOCK), 1, 1))
        else:
            rows, cols = sizes(launch)  # fewer tiles than the device has multiprocessors: a program each
            assert launch.grid == (ceil(m, rows) * ceil(n, cols), 1, 1)


@by_arch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=SUFFIX.get)
def test_a_training_step(arch, dtype):
    launches = made(arch, step, problem(512, 512, 64, dtype), Softmax())
    assert names(launches) == ["forward", "merge", "merge", "gradient"]
    assert_covers(launches, 512, 512)
    for launch in launches[::3]:
        assert_asynchronous(launch, dtype)
    assert len(distinct(launches)) <= 4


@by_arch
@pytest.mark.parametrize(("m", "n", "d"), [(300, 517, 100), (1, 512, 64), (512, 1, 64), (1, 1, 8), (1, 1, 1)])
def test_ragged_and_small_batches(arch, m, n, d):
    launches = made(arch, step, problem(m, n, d), Softmax())
    assert names(launches) == ["forward", "merge", "merge", "gradient"]
    assert_covers(launches, m, n)
    for launch in launches[::3]:
        assert_asynchronous(launch, torch.bfloat16)
        assert launch.constants["D"][0] == ceil(d, 8) * 8  # rows of whole 16 bytes


@by_arch
@pytest.mark.parametrize("targets", ["labels", "ids"])
def test_targets(arch, targets):
    launches = made(arch, step, problem(512, 512, 64, targets=targets), Softmax())
    assert names(launches) == ["forward", "merge", "merge", "gradient"]
    pointers = launches[0].signature["entries"]
    wanted = {"labels": [3], "ids": [3, 4, 5]}[targets]  # target, row ids and column ids; 32 bits each
    assert [k for k, kind in enumerate(pointers) if kind == "*i32"] == wanted


OPTIONS = {
    "gap": Softmax(gap=True),
    "teacher": Softmax(gap=True, teacher=True),
    "factor": Softmax(factor=True),
    "in": Softmax(positives="in"),
    "hard": Softmax(hardness=True),
    "hinge": Hinge(),
    "hardest": Softmax(hardest=True),
    "margin": Softmax(margin=True),
    "guide": Softmax(limit=True, guide=True),
}


@by_arch
@pytest.mark.parametrize("statistic", OPTIONS.values(), ids=OPTIONS)
def test_options(arch, statistic, small_tiles):
    launches = made(arch, step, problem(256, 256, 64, targets="ids"), statistic)
    of_teacher = ["gradient"] * getattr(statistic, "teacher", False)
    assert names(launches) == ["forward", "merge", "merge", "gradient", *of_teacher]
    assert_covers(launches, 256, 256)


def test_a_loss_and_its_negatives_are_one_launch(small_tiles):
    together = 90, select, problem(128, 128, 64, targets="ids"), 2, False, False, Softmax(gap=True)
    assert names(made(*together)) == ["select", "merge", "merge"]
    with configs.use("fused", None), configs.use("select", configs.Tile(32, 32, 32, 32, warps=4, stages=2)):
        assert names(made(*together)) == ["select", "forward", "merge", "merge"]


def test_what_is_not_asked_for_is_not_read(small_tiles):
    plain, biased, hard, limited = (
        made(90, step, problem(512, 512, 64), statistic, (True, True, True), col_bias)
        for statistic, col_bias in (
            (Softmax(), False), (Softmax(), True), (Softmax(hardness=True), False), (Softmax(limit=True), False)
        )
    )  # fmt: skip
    pointers = [{k for k, kind in enumerate(calls[0].signature["entries"]) if kind == "*fp32"} for calls in (
        plain, biased, hard, limited
    )]  # fmt: skip
    assert pointers == [{0}, {0, 8}, {0, 11}, {0, 9, 10}]  # the scale; biases of columns; numbers; limits
    assert plain[-1].constants["COL_SUMS"] is None and biased[-1].signature["COL_SUMS"] == "*fp32"
    assert all(calls[0].constants["TX"] is None for calls in (plain, biased, hard, limited))


@by_arch
@pytest.mark.parametrize(("rows", "cols"), [(True, False), (False, True)])
def test_one_direction(arch, rows, cols):
    launches = made(arch, step, problem(512, 512, 64), Softmax(rows, cols))
    assert names(launches) == ["forward", "merge", "gradient"]


def test_frozen_towers_cost_no_launch(small_tiles):
    given = problem(512, 512, 64)
    assert names(made(90, step, given, Softmax(), (False, False, False))) == ["forward", "merge", "merge"]
    needs = (True, True, True), (True, False, False), (False, False, True)
    with_scale, without, alone = (made(90, step, given, Softmax(), need)[-1] for need in needs)
    assert with_scale.signature["SUMS"] == "*fp32" and with_scale.signature["OUT"].startswith("tensordesc<bf16[")
    assert without.constants["SUMS"] is None
    assert alone.constants["OUT"] is None and alone.constants["OUT_PIECE"] is None


@by_arch
@pytest.mark.parametrize(("targets", "weighted"), [("paired", False), ("ids", False), ("paired", True)])
def test_a_sigmoid_step_is_one_launch(arch, targets, weighted):
    given = problem(512, 512, 64, targets=targets, bias=True)
    launches = made(arch, sweep, given, (True, True, True), weighted)
    assert names(launches) == ["gradient"]
    assert_covers(launches, 512, 512)
    assert_asynchronous(launches[0], torch.bfloat16)


def test_features_that_do_not_lie_on_16_bytes_are_copied(small_tiles):
    x, y = (torch.zeros(512 * 64 + 1, dtype=torch.bfloat16)[1:].view(512, 64) for _ in range(2))
    given = problem(512, 512, 64)
    fields = (x, y, *given.tensors()[2:])
    launches = made(90, step, type(given)(*fields), Softmax())
    assert distinct(launches) == distinct(made(90, step, given, Softmax()))


def test_a_small_workspace_makes_more_launches_of_the_same_kernels(monkeypatch, small_tiles):
    given = problem(1024, 1024, 64)
    whole = made(90, step, given, Softmax())
    monkeypatch.setattr(backend, "_workspace", 2**18)
    pieces = made(90, step, given, Softmax())
    assert names(pieces).count("gradient") > names(whole).count("gradient")
    assert set(names(pieces)) == set(names(whole))


def test_the_next_batch_size_compiles_little(small_tiles):
    batches = (512, 640, 1024, 517, 333)
    kernels = [distinct(made(90, step, problem(size, size, 64), Softmax(), multiprocessors=4)) for size in batches]
    # Triton specialises an integer for 1 and for multiples of 16
    assert len(set().union(*kernels[:3])) <= 6
    assert len(set().union(*kernels)) <= 12


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_the_precision_of_fp32_follows_pytorch(setting, precision, small_tiles):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with dry_run(90) as launches:
            step(problem(128, 128, 64, torch.float32), Softmax(), (False, False, False))
    finally:
        torch.set_float32_matmul_precision(before)
    assert launches[0].constants["LOAD"] == (True, precision)
