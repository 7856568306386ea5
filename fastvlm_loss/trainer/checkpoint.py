"""A run on disk: written beside and renamed, so that it is there whole or not at all; without pickles.

step_00000150/model.safetensors, config.json, vocabulary.json     what `VLPretrainModel.load` reads
step_00000150/state/                                             optimiser, averages, queues, tables (safetensors)
step_00000150/meta.json                                          step, cursor, configuration, versions, checksums
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from .world import World

__all__ = ["CheckpointError", "Checkpoints", "read_state"]

_NAME = re.compile(r"step_(\d{8})")
Meta = dict[str, Any]


class CheckpointError(ValueError):
    """A folder that is no whole checkpoint of a run."""


class Checkpoints:
    """Those of a run, in its folder.

    Args:
        folder: of the run.
        keep: newest ones that stay.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, max(1, keep), world

    def save(self, step: int, meta: Meta, write: Callable[[Path], None], state: Mapping[str, Tensor]) -> Path:
        """Write one; every process calls it, the first writes what is not sharded by `write`."""
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        if self.world.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
        self.world.wait()
        with _quiet():
            writer = HuggingFaceStorageWriter(str(part / "state"), save_distributed=self.world.size > 1)
            whole = {name: value.contiguous() for name, value in state.items()}  # as safetensors wants them
            state_dict_saver.save(whole, storage_writer=writer, no_dist=self.world.size == 1)
        self.world.wait()
        if self.world.first:
            files = {str(p.relative_to(part)): _digest(p) for p in sorted(part.rglob("*")) if p.is_file()}
            (part / "meta.json").write_text(json.dumps({**meta, "step": step, "files": files}, indent=1))
            for path in (*(part / name for name in files), part / "meta.json", part):
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)  # only where the same step is written again
            part.replace(final)
            _flush(self.folder)
            self._tidy()
        self.world.wait()
        return final

    def keep_best(self, source: Path) -> None:
        """Keep a copy of a checkpoint under the name `best`."""
        if self.world.first:
            part, best, old = (self.folder / name for name in (".best.part", "best", ".best.old"))
            for stale in (part, old):
                shutil.rmtree(stale, ignore_errors=True)
            shutil.copytree(source, part, copy_function=_link)
            if best.exists():
                best.replace(old)
            part.replace(best)
            shutil.rmtree(old, ignore_errors=True)
        self.world.wait()

    def latest(self) -> tuple[Path, Meta] | None:
        """The newest whole one; what is damaged is named on stderr and passed over.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        damaged = []
        for path in reversed(self._all()):
            try:
                return path, verified(path)
            except CheckpointError as error:
                damaged.append(str(error))
                if self.world.first:
                    print(f"{error}; the one before it is used", file=sys.stderr)
        if damaged:
            raise CheckpointError(f"resume: got {self.folder} where no checkpoint is whole: {'; '.join(damaged)}")
        return None

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if _NAME.fullmatch(p.name))

    def _tidy(self) -> None:
        for path in self._all()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)


def verified(path: Path) -> Meta:
    """The meta.json of a checkpoint all of whose files are as they were written.

    Raises:
        CheckpointError: naming what is missing or changed.
    """
    try:
        meta: Meta = json.loads((path / "meta.json").read_text())
        files = meta["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path.name}: meta.json is unreadable ({type(error).__name__})") from error
    for name, digest in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path.name}: {name} is missing")
        if _digest(path / name) != digest:
            raise CheckpointError(f"checkpoint {path.name}: {name} is damaged")
    return meta


def read_state(path: Path, wanted: Callable[[str, Any], Tensor | None], world: World) -> dict[str, Tensor]:
    """The tensors of `state/`; `wanted(name, size)` makes the one to read into, or None to leave it out."""
    reader = HuggingFaceStorageReader(str(path / "state"))
    found = reader.read_metadata().state_dict_metadata
    sizes = {name: getattr(entry, "size", torch.Size([])) for name, entry in found.items()}
    places = {name: wanted(name, size) for name, size in sizes.items()}
    state = {name: tensor for name, tensor in places.items() if tensor is not None}
    for name, tensor in state.items():
        if tensor.shape != sizes[name]:
            raise CheckpointError(
                f"checkpoint {path.name}: got {name} of shape {list(sizes[name])}, wanted {list(tensor.shape)}: "
                "another version of the trainer wrote it"
            )
    if state:
        with _quiet():
            state_dict_loader.load(state, storage_reader=reader, no_dist=world.size == 1)
    return state


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _flush(path: Path) -> None:
    """To the disk, so that a rename does not come before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield
