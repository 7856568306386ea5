"""Run jobs in forked children: what kills a compiler kills one job, and two cores do two at a time."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import IO, Any, TypeVar

import torch

__all__ = ["forked"]

Job = TypeVar("Job")


def forked(function: Callable[[Job], Any], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Any, str]]:
    """For each job, as they end: the job, what `function` returned (or None), and what went wrong (or "").

    The result must pickle. PyTorch runs on one thread in a child: its pool does not survive the fork.
    """
    context = get_context("fork")
    waiting = list(jobs)[::-1]
    running: dict[Any, tuple[Job, Any, IO[bytes]]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            job, log = waiting.pop(), tempfile.TemporaryFile()  # noqa: SIM115 (closed when the job ends)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(function, job, sender, log))
            process.start()
            sender.close()
            running[receiver] = job, process, log
        for ready in wait(list(running)):
            job, process, log = running.pop(ready)
            try:
                result, error = ready.recv()
            except EOFError:
                process.join()
                result, error = None, f"the compiler died (exit code {process.exitcode})"
            process.join()
            yield job, result, f"{error} {_diagnosis(log)}".strip() if error else ""
            ready.close()
            log.close()


def _child(function: Callable[[Job], Any], job: Job, sender: Any, log: IO[bytes]) -> None:
    faulthandler.disable()
    os.dup2(log.fileno(), 2)  # the compiler's C++ writes there
    sys.stderr = os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    try:
        sender.send((function(job), ""))
    except Exception as error:  # noqa: BLE001 (whatever it is, it is that job's result)
        sender.send((None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


def _diagnosis(log: IO[bytes]) -> str:
    """The compiler's own first error or failed assertion."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if "error:" in line or "Assertion" in line]
    return f"[{said[0][:200]}]" if said else ""
