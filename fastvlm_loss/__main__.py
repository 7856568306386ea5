"""`python -m fastvlm_loss`: versions, live backends with reasons, instruction set, threads, GPU."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .engine.dispatch import report
from .kernels.lang import HAS_TRITON


def lines() -> list[str]:
    """The report, one fact a line."""
    triton = __import__("triton").__version__ if HAS_TRITON else "not installed"
    out = [
        f"fastvlm_loss {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {triton}",
        f"threads: {torch.get_num_threads()}",
    ]
    out += [f"backend {name}: {state}" for name, state in report().items()]
    if torch.cuda.is_available():
        out += [f"gpu {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        out.append("gpu: none")
    return out


if __name__ == "__main__":
    print("\n".join(lines()))
