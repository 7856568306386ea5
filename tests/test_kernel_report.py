"""The kernel report on a small product: what it counts, and that its gate catches what it is there for."""

import json
import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tools.devices import DEVICES  # noqa: E402
from tools.dryrun import dry_run  # noqa: E402
from tools.kernel_cases import Case  # noqa: E402
from tools.kernel_report import main, report  # noqa: E402
from tools.kernel_stats import product, stats  # noqa: E402


@triton.jit
def row_sums(x, y, out, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, D // BK):
            acc = tl.dot(x.load([0, k * BK]), y.load([0, k * BK]).T, acc)
    else:
        d = tl.arange(0, BK)[None, :]
        for k in range(0, D // BK):
            a = tl.load(x + tl.arange(0, BM)[:, None] * D + d + k * BK)
            b = tl.load(y + tl.arange(0, BN)[:, None] * D + d + k * BK)
            acc = tl.dot(a, tl.trans(b), acc)
    tl.store(out + tl.arange(0, BM), tl.sum(tl.exp2(acc), 1))


def launch(bm=128, bn=128, bk=64, tma=False, skip=0, warps=8, stages=3, d=4096):
    """Row sums of exp2(x y^T), the features `skip` elements from where memory is aligned."""
    x, y = (torch.empty(rows * d + skip, dtype=torch.bfloat16)[skip:].view(rows, d) for rows in (bm, bn))
    if tma:
        x, y = TensorDescriptor.from_tensor(x, [bm, bk]), TensorDescriptor.from_tensor(y, [bn, bk])
    row_sums[(1,)](
        x, y, torch.empty(bm), d, bm, bn, bk, tma, num_warps=warps, num_stages=stages, enable_fp_fusion=True
    )  # fmt: skip


def case(name="sums", loads=None, archs=(90,), **how):
    return Case(name, lambda: launch(**how), archs, loads)


def only_row(*arguments, **options):
    (row,) = report([case(*arguments, **options)])
    return row


@pytest.mark.parametrize(("arch", "tma"), [(80, False), (90, True), (100, True)])
def test_what_is_counted(arch, tma):
    with dry_run(arch) as launches:
        launch(tma=tma)
    (made,) = launches
    assert (made.name, made.grid, made.arch) == ("row_sums", (1, 1, 1), arch)
    assert made.constants == {"D": 4096, "BM": 128, "BN": 128, "BK": 64, "TMA": tma}
    assert made.signature["x"] == ("tensordesc<bf16[128, 64]>" if tma else "*bf16")
    assert "out" in made.aligned
    counted, tile, device = stats(made.kernel), product(made.kernel), DEVICES[arch]
    assert (counted.products, counted.loads, counted.stores) == (device.products, device.loads, "st")
    assert (counted.spills, counted.local, counted.warnings) == (0, 0, ())
    assert 32 < counted.registers <= 255
    assert counted.exponentials == 128 * 128 // (8 * 32)
    assert 0 < counted.loop < counted.outside
    assert (tile.m, tile.n, tile.k, tile.dtype) == (128, 128, 64, "bf16")
    assert tile.clocks == 2 * 128 * 128 * 64 // device.tensor_rate
    assert tile.bytes_per_clock == 2 * 128 * 64 * 2 // tile.clocks


def test_alignment_is_what_the_launch_gives():
    with dry_run(90) as launches:
        launch(skip=1)
        launch(skip=8)
    assert [launch.aligned >= {"x", "y"} for launch in launches] == [False, True]
    assert launches[0].kernel is not launches[1].kernel


def test_a_kernel_compiled_before_is_recorded_again():
    for _ in range(2):
        with dry_run(90) as launches:
            launch(tma=True)
        assert len(launches) == 1
    from triton.runtime.driver import driver

    assert driver._active is None or driver._active.get_current_device() < 1000


def test_resident_blocks():
    h200 = DEVICES[90]
    assert h200.resident_blocks(warps=8, registers=128, shared=0) == 2
    assert h200.resident_blocks(warps=8, registers=129, shared=0) == 1
    assert h200.resident_blocks(warps=4, registers=32, shared=113 * 1024) == 2
    assert h200.resident_blocks(warps=1, registers=16, shared=0) == 32
    assert DEVICES[100].resident_blocks(warps=4, registers=64, shared=0, tensor_memory=256) == 2


def test_the_gate_passes_what_is_as_it_should_be():
    rows = report([case(tma=True), case("pointers", "cp.async"), case("pointers again", "cp.async")])
    assert [(row["cases"], row["faults"]) for row in rows] == [(["sums"], []), (["pointers", "pointers again"], [])]


def test_the_gate_catches_spills_and_serialised_products():
    row = only_row(tma=True, bn=256, warps=4)
    assert row["spills"] > 0
    assert any(fault.startswith("spills: ") for fault in row["faults"])
    assert any(re.fullmatch(r"serialised products: C75\d\d", fault) for fault in row["faults"])


def test_the_gate_catches_a_lost_asynchronous_path():
    assert only_row()["faults"] == ["loads: cp.async, wanted tma"]
    assert "loads: ld, wanted cp.async" in only_row(loads="cp.async", skip=1)["faults"]


def test_the_gate_catches_too_much_shared_memory():
    row = only_row(tma=True, bn=256, stages=6)
    assert row["kernel"] == ""
    assert re.search(r"out of resource: shared memory, Required: \d+, Hardware limit: 232448", row["faults"][0])


def test_a_compiler_that_dies_costs_its_call_only():
    rows = report([Case("abort", os.abort, (90,)), Case("raise", lambda: 1 // 0, (90,)), case(tma=True)])
    assert [bool(row["faults"]) for row in rows] == [True, True, False]
    assert "died (exit code -6)" in rows[0]["faults"][0]
    assert "ZeroDivisionError" in rows[1]["faults"][0]


def test_the_command_line(tmp_path, capsys):
    cases = [case(tma=True), Case("abort", os.abort, (90,))]
    out = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    assert main(["--arch", "90", *out], cases) == 0
    text = capsys.readouterr().out
    assert "128x128x64 bf16" in text and "2 kernels of 2 calls, 1 with faults" in text
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["triton"] == triton.__version__ and [row["kernel"] for row in found["rows"]] == ["row_sums", ""]
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert main(["--arch", "90", "--gate"], cases) == 1
    assert main(["--arch", "90", "--gate", "-k", "sum"], cases) == 0
