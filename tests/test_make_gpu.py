"""`make gpu`: its steps and their time, the tests counted, the sanitizer, one JSON and a table printed last."""

import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a program of the repository, not a part of the package

from tools import gpu


@pytest.fixture
def session(tmp_path):
    return gpu.Session(rehearse=True, folder=tmp_path)


def python(code, seconds, **environment):
    return gpu.command([sys.executable, "-c", code], seconds, {**os.environ, **environment})


def test_a_step_that_runs_over_is_stopped_with_its_children_and_the_rest_runs():
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('started', flush=True); time.sleep(60)"
    )

    def slow(seconds):
        ended = python(stubborn, 1.5)
        assert ended.over and ended.status < 0 and ended.last() == "started"
        return "over time", "stopped"

    work = [gpu.Step("slow", 30, slow), gpu.Step("next", 30, lambda seconds: ("passed", f"{seconds <= 30}"))]
    start = time.monotonic()
    done = list(gpu.taken(work, start + 60))
    assert time.monotonic() - start < 20
    assert [(s["step"], s["outcome"], s["detail"]) for s in done] == [
        ("slow", "over time", "stopped"),
        ("next", "passed", "True"),
    ]
    late = next(gpu.taken(work, time.monotonic() + 1))
    assert (late["outcome"], late["detail"]) == ("skipped", "no time left")


def test_an_interrupted_step_may_still_report():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    try:
        ended = python("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('partial result')", 6)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.over and ended.status == 0 and ended.last() == "partial result"


def test_the_gpu_tests_are_counted_with_their_reasons(session, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no peer')\ndef test_skipped(): pass\n"
    )
    (tmp_path / "tests" / "test_b.py").write_text("import a_package_nobody_has\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert session.test(60) == ("failed", "1 passed, 1 failed, 2 skipped")
    assert len(session.tests["failures"]) == 1 and "test_bad" in session.tests["failures"][0]
    reasons = session.tests["skip_reasons"]
    assert reasons["no peer"] == 1 and any("a_package_nobody_has" in why for why in reasons)


def test_the_sanitizer_is_skipped_where_it_cannot_run_and_fails_on_errors(tmp_path, monkeypatch):
    session = gpu.Session(rehearse=False, folder=tmp_path)
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, outcome in (
        ("echo '========= Error: Device not supported'; exit 255", "skipped"),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 99", "failed"),
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed"),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert session.sanitize(20)[0] == outcome
    tool.unlink()
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert session.sanitize(20) == ("skipped", "no compute-sanitizer on this machine")


def test_the_reason_is_the_line_with_the_error():
    lines = ["error: subprocess-exited-with-error", "  ValueError: invalid license", "hint: See above"]
    assert gpu.Ended(1, False, deque(lines)).reason() == "ValueError: invalid license"
    assert gpu.Ended(1, False, deque(["error: externally-managed-environment", "hint"])).reason().endswith("ment")
    assert gpu.Ended(1, False, deque(["killed", ""])).reason() == "killed"


def test_an_install_that_fails_falls_back_to_the_checkout(tmp_path, monkeypatch):
    session = gpu.Session(rehearse=False, folder=tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # nothing to install there
    outcome, detail = session.install(60)
    assert outcome == "fell back" and "pip failed" in detail
    assert session.environment["PYTHONPATH"].split(":")[0] == str(tmp_path)


@pytest.mark.parametrize("failed", [False, True])
def test_make_gpu_saves_one_json_and_prints_the_table_last(failed, tmp_path, monkeypatch, capfd):
    row = {"contestant": "fastvlm_loss", "dtype": "bfloat16", "n": 256, "d": 64, "mode": "forward + backward"}
    lists = {"gate": [], "first_calls": [], "checks": [], "left_out": [], "not_reached": [], "fits": []}
    times = {"median": 0.001, "min": 0.001, "spread": 0.0, "repeats": 2, "over_limit": 1.5}
    loss = {"missing": {}, "refused": {}, **lists, "speed": [{**row, **times}], "memory": [{**row, "extra": 10**6}]}
    measured = {**gpu.nothing(rehearse=True), "losses": {"clip_loss": loss}}

    def steps(session):
        def benchmark(seconds):
            if not failed:
                gpu.store.save(measured, session.folder / "gpu.json")
            return ("failed", "died") if failed else ("passed", "")

        session.tests = {"passed": 3, "failed": 0, "skipped": 1, "failures": [], "skip_reasons": {"no peer": 1}}
        return [gpu.Step("benchmark", 60, benchmark)]

    monkeypatch.setattr(gpu, "steps", steps)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--rehearse"]) == int(failed)
    saved = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert saved["steps"][0]["outcome"] == ("failed" if failed else "passed") and saved["tests"]["passed"] == 3
    assert saved["versions"]["torch"] and saved["hardware"] and bool(saved["losses"]) != failed
    printed = capfd.readouterr().out
    assert printed.index("| benchmark |") < printed.index("skipped 1: no peer") < printed.index("A rehearsal without")
    assert failed or printed.rstrip().splitlines()[-1].startswith("not measured: GB extra")


def test_make_gpu_without_a_gpu_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_plan_of_steps_fits_the_time(session):
    work = gpu.steps(session)
    assert [step.name for step in work] == ["install", "gpu tests", "compute-sanitizer", "negatives", "benchmark"]
    assert gpu.SECONDS == 480 and sum(step.seconds for step in work[:-1]) < gpu.SECONDS - 120
