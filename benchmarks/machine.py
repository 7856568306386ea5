"""On what and with what a run was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastvlm_loss.backends import cpp
from fastvlm_loss.engine.dispatch import report

__all__ = ["available_memory", "hardware", "versions"]

PACKAGES = ("fastvlm_loss", "torch", "triton", "open_clip_torch", "numpy")
PEERS = ("inf-cl", "memeff", "siglip-kernel", "cut-cross-entropy", "liger-kernel", "nvidia-cutlass-dsl")


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory, live backends with their instruction set, and the GPU if that is the device."""
    found: dict[str, Any] = {
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _bytes("MemTotal"),
        "threads": torch.get_num_threads(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": None if cpp.unavailable() else cpp.instruction_set(),
        "backends": report(),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "gpu_memory": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2": gpu.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def versions(peers: bool = False) -> dict[str, str | None]:
    """Python, the packages (None if not installed) and the commit."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *PEERS) if peers else PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "commit": _commit()}


def available_memory() -> int | None:
    """Bytes a new process could have without pushing others out, None where that is not known."""
    return _bytes("MemAvailable")


def _bytes(field: str) -> int | None:
    value = _proc("meminfo", field)
    return int(value.split()[0]) * 1024 if value else None


def _proc(file: str, field: str) -> str:
    with suppress(OSError):
        for line in (Path("/proc") / file).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _driver() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return lines[0].strip() if lines else None
    return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parents[1])]
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"])
        return commit.stdout.strip() + (" with changes" if changed.returncode else "")
    return None
