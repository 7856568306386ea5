"""`make gpu`: installs, tests, checks and measures the library on the GPU of this machine, within eight minutes.

It uses the Python, torch and Triton that are there and downloads nothing. Each step has its own time: one that runs
over is stopped and named, and the rest still runs. What is missing is skipped with its reason. The results are one
JSON, named after the GPU, and a table printed last. Exit status: 0 good, 1 something failed, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import store  # noqa: E402 (needs nothing beyond Python)

SECONDS = 480.0
TABLE = 15.0  # kept for the table
GRACE = 8.0  # between asking a step to stop and making it
FOUND = 99  # compute-sanitizer's exit status for an error in a kernel
SMALL = """
import torch
from fastvlm_loss.losses import registry
from fastvlm_loss.testing import Case, violations
for spec in registry.values():
    for dtype in (torch.bfloat16, torch.float32):
        found = violations(spec, Case(150, 72, bias=-2.0, dtype=dtype, device="cuda", options=spec.variants[0]))
        assert not found, found
print("small case: right")
"""
Run = Callable[[float], tuple[str, str]]


@dataclass
class Step:
    """A part of the work: `run` gets the seconds it has and returns its outcome and a detail."""

    name: str
    seconds: float
    run: Run


@dataclass
class Ended:
    """A command that ended, or was stopped because its time was over."""

    status: int
    over: bool
    lines: deque[str]

    def last(self) -> str:
        """The last line it printed."""
        return next((line for line in reversed(self.lines) if line.strip()), "").strip()

    def reason(self) -> str:
        """The line that says what went wrong, or the last."""
        for sign in (r"\s*\w+Error: ", r"(?i)\s*error: "):
            if found := [line.strip() for line in self.lines if re.match(sign, line)]:
                return found[-1]
        return self.last()


@dataclass
class Session:
    """What the steps share: options, environment, and what they found."""

    rehearse: bool
    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    tests: dict[str, Any] = field(default_factory=dict)

    def install(self, seconds: float) -> tuple[str, str]:
        """An editable install without dependencies or network; else the checkout itself."""
        if self.rehearse:
            return "skipped", "a rehearsal"
        pip = ["-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation", "--no-index"]
        ended = command([sys.executable, *pip, "-e", str(ROOT)], seconds, {"FASTVLM_LOSS_CPP": "auto", **os.environ})
        if ended.status == 0:
            return "passed", ended.last()
        before = os.environ.get("PYTHONPATH")
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
        why = "pip took too long" if ended.over else f"pip failed: {ended.reason()}"
        return "fell back", f"runs from the checkout; {why}"

    def test(self, seconds: float) -> tuple[str, str]:
        """The tests marked `gpu`."""
        if importlib.util.find_spec("pytest") is None:
            return "skipped", "No module named 'pytest'"
        xml = self.folder / "tests.xml"
        pytest = ["-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        ended = command([sys.executable, *pytest, f"--junitxml={xml}"], seconds, self.environment)
        self.tests = counted(xml) if xml.exists() else {}
        counts = {what: n for what, n in self.tests.items() if isinstance(n, int)}
        said = ", ".join(f"{n} {what}" for what, n in counts.items()) if any(counts.values()) else ended.last()
        if ended.over:
            return "over time", said
        ran = counts.get("passed") or (self.rehearse and any(counts.values()))  # on a GPU, all skipped is not passed
        return "failed" if self.tests.get("failed", 1) or not ran else "passed", said

    def sanitize(self, seconds: float) -> tuple[str, str]:
        """`compute-sanitizer` on a small case, with no caching allocator to hide a stray access."""
        tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if self.rehearse or tool is None:
            return "skipped", "a rehearsal" if self.rehearse else "no compute-sanitizer on this machine"
        asked = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable, "-c", SMALL]
        ended = command(asked, seconds, {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if ended.over:
            return "over time", ended.last()
        refused = next((line for line in ended.lines if "not supported" in line.lower()), "")
        if refused and ended.status:
            return "skipped", refused.strip(" =")
        return "failed" if ended.status else "passed", ended.last().strip(" =")

    def benchmark(self, seconds: float) -> tuple[str, str]:
        """`python -m benchmarks --suite gpu`; it saves after every size, so that stopping it loses one."""
        tiny = ["--quick", "--device", "cpu", "--repeats", "2"] if self.rehearse else []
        budget = max(seconds - 2 * GRACE, 1.0) * 0.9  # the last size may run a little over
        asked = ["-m", "benchmarks", "--suite", "gpu", "--budget", f"{budget:.0f}", "--output", str(self.folder), *tiny]
        ended = command([sys.executable, *asked], seconds, self.environment)
        if ended.over:
            return "over time", ended.last()
        return ("failed", ended.reason()) if ended.status else ("passed", "")

    def negatives(self, seconds: float) -> tuple[str, str]:
        """`python -m benchmarks.negatives`."""
        how = ["--quick", "--device", "cpu", "--rounds", "2"] if self.rehearse else ["--device", "cuda"]
        asked = ["-m", "benchmarks.negatives", *how, "--output", str(self.of_negatives)]
        ended = command([sys.executable, *asked], seconds, self.environment)
        if ended.over:
            return "over time", ended.last()
        return ("failed", ended.reason()) if ended.status else ("passed", ended.last())

    @property
    def of_negatives(self) -> Path:
        """Where its result is."""
        return self.folder / "negatives" / "result.json"


def main(arguments: list[str] | None = None) -> int:
    """Run all steps, save the JSON, print the table."""
    start = time.monotonic()
    parser = argparse.ArgumentParser("python tools/gpu.py", description=__doc__)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=os.environ.get("OUT") or store.RESULTS,
        help="where the JSON goes (default: the environment's OUT, else benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="no GPU, tiny sizes: whether this program works")
    asked = parser.parse_args(arguments)
    if not asked.rehearse and (why := no_gpu()):
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        session = Session(asked.rehearse, Path(folder))
        done = list(taken(steps(session), start + asked.seconds - TABLE))
        found = sorted(session.folder.glob("*.json"))
        negatives = store.load(session.of_negatives) if session.of_negatives.exists() else None
        result = {**(store.load(found[0]) if found else nothing(asked.rehearse)), "steps": done, "tests": session.tests}
    output = Path(asked.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{result['name']}.json"
    store.save(result, path)
    if negatives is not None:
        beside = output / "negatives" / path.name
        beside.parent.mkdir(exist_ok=True)
        store.save({k: v for k, v in negatives.items() if k != "name"}, beside)
    print(*summary(result), f"Saved {path}", sep="\n", flush=True)
    left = max(start + asked.seconds - time.monotonic(), 5.0)
    show = command([sys.executable, "-m", "benchmarks", "show", str(path)], left, session.environment)
    bad = [step for step in done if step["outcome"] in ("failed", "over time")]
    return int(bool(bad) or show.status != 0)


def steps(session: Session) -> list[Step]:
    """Correctness before speed; the benchmark has what the others leave."""
    return [
        Step("install", 60, session.install),
        Step("gpu tests", 230, session.test),
        Step("compute-sanitizer", 35, session.sanitize),
        Step("negatives", 30, session.negatives),
        Step("benchmark", SECONDS, session.benchmark),
    ]


def taken(work: list[Step], end: float) -> Iterator[dict[str, Any]]:
    """Each step in turn, with its own time but never more than is left."""
    for step in work:
        start = time.monotonic()
        seconds = min(step.seconds, end - start)
        print(f"== {step.name}: at most {max(seconds, 0):.0f} s", flush=True)
        outcome, detail = step.run(seconds) if seconds > GRACE else ("skipped", "no time left")
        took = round(time.monotonic() - start, 1)
        print(f"== {step.name}: {outcome} after {took} s{': ' * bool(detail)}{detail}", flush=True)
        yield {"step": step.name, "outcome": outcome, "seconds": took, "allowed": round(seconds, 1), "detail": detail}


def command(asked: list[str], seconds: float, environment: dict[str, str]) -> Ended:
    """Run it from the checkout, show what it prints, and stop it, with all its children, when its time is over."""
    process = subprocess.Popen(
        asked, cwd=ROOT, env={**environment, "PYTHONUNBUFFERED": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, errors="replace",
        # a job in the background (nohup make gpu &) ignores interrupts, and so would its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=2000)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    grace = min(GRACE, seconds / 4)
    over = False
    for wait, after in ((seconds - grace, signal.SIGINT), (grace, signal.SIGKILL)):  # pytest reports when interrupted
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            over = True
            os.killpg(process.pid, after)
    status = process.wait()
    reader.join(2)
    return Ended(status, over, lines)


def counted(xml: Path) -> dict[str, Any]:
    """Tests passed, failed and skipped, the names of the failed, the reasons of the skipped."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    reasons: Counter[str] = Counter()
    failures = []
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        ends = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
        said = next((end for end in ends.values() if end is not None), None)
        text = "" if said is None else f"{said.get('message', '')}\n{said.text or ''}"
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        missing = [line for line in text.splitlines() if "ModuleNotFoundError: " in line and "collection" in text]
        if said is None:
            counts["passed"] += 1
        elif ends["skipped"] is not None or missing:
            counts["skipped"] += 1
            reasons[f"{name}: {missing[-1].strip(' E')}" if missing else said.get("message", "")] += 1
        else:
            counts["failed"] += 1
            failures.append(f"{name}: {next(iter(text.strip().splitlines()), '')}")
    return {**counts, "failures": failures, "skip_reasons": dict(reasons)}


def no_gpu() -> str:
    """Why there is nothing to run on, in one line, or nothing."""
    try:
        import torch
    except ImportError as error:
        return f"no torch here: {error}"
    return "" if torch.cuda.is_available() else f"no CUDA device that torch {torch.__version__} can use"


def nothing(rehearse: bool) -> dict[str, Any]:
    """The frame of a result whose benchmark brought none: on what it was tried."""
    import torch

    hard: dict[str, Any] = {"cpu": platform.processor() or platform.machine()}
    if not rehearse:
        gpu = torch.cuda.get_device_properties("cuda")
        hard |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "driver": None, "cuda": torch.version.cuda}
    return {
        "name": "gpu" if rehearse else store.slug(hard["gpu"]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hard,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {"repeats": 0, "quick": rehearse, "headline": []},
        "losses": {},
    }


def summary(result: dict[str, Any]) -> Iterator[str]:
    """The steps, the failed tests and why others were skipped."""
    yield "\n| step | outcome | seconds | |\n| --- | --- | ---: | --- |"
    for step in result["steps"]:
        yield f"| {step['step']} | {step['outcome']} | {step['seconds']:.0f} | {step['detail']} |"
    yield ""
    yield from (f"failed: {name}" for name in result["tests"].get("failures", []))
    yield from (f"skipped {n}: {why}" for why, n in result["tests"].get("skip_reasons", {}).items())


if __name__ == "__main__":
    raise SystemExit(main())
