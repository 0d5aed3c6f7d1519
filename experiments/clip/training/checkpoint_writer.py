"""Writes the checkpoints of a run while training continues."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..distributed import Ranks
from ..errors import UserError
from ..io.checksums import CHECKSUM, checksum, write_manifest
from ..io.files import retry_with_backoff, share_permissions, sync, write_atomically, writing
from .checkpoint import (
    FORMAT,
    OWN,
    SHARED,
    chunk_of,
    part_paths,
    step_folder,
    step_folders,
    step_number,
    system_errors,
)

_PARTIAL = ".partial-"
_OLD = f"{_PARTIAL}old-"


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, one at a time.

    `start` copies the state and returns; `commit`, once no rank `is_writing`, publishes the checkpoint. All ranks call
    both at the same steps. From a GPU the copies go to page-locked memory, which is kept for the next checkpoint, in
    the order of the stream that runs: the host goes on to the next step, and the thread that writes waits for them.

    Parameters
    ----------
    folder : Path
        Where the run's checkpoints are.
    settings : dict
        All that the weights depend on, in JSON's types.
    keep : int
        How many of the last checkpoints are kept.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], ranks: Ranks, keep: int) -> None:
        self._folder, self._settings, self._ranks, self._keep = folder, settings, ranks, keep
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self._step = -1
        self._spared: Callable[[int], int | None] = lambda step: None
        self._locked_pages: dict[str, Tensor] = {}
        if ranks.leads:
            _recover(folder)
        ranks.wait()

    def is_of(self, step: int) -> bool:
        """Whether the checkpoint that was started or resumed from last is of this step and this number of ranks."""
        return self._step == step

    def resumed_from(self, step: int, ranks: int) -> None:
        """Note from which checkpoint the run resumes."""
        self._step = step if ranks == self._ranks.count else -1

    @property
    def has_begun(self) -> bool:
        """Whether a checkpoint was started and is not committed; the same on every rank."""
        return self._thread is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is not on the disk yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        counts: Mapping[str, int],
        progress: dict[str, Any],
        spared: Callable[[int], int | None] = lambda step: None,
    ) -> None:
        """Copy the state after ``progress["step"]`` steps and start to write it.

        Parameters
        ----------
        shared : mapping
            Tensors that all ranks have, or have shards of.
        own : mapping
            This rank's own tensors.
        counts : mapping
            This rank's own counts.
        progress : dict
            What else all ranks have in common, in JSON's types.
        spared : callable
            Returns, for a step whose checkpoint is kept, another whose checkpoint must then be kept too, if any.
        """
        self.commit()
        self._step, self._spared = progress["step"], spared
        partial = self._partial()
        if self._ranks.leads:
            _remove_partial(self._folder)  # what a killed run left, too
        self._ranks.wait()
        tensors, chunks = self._copied(shared)
        tensors |= {f"{OWN}{key}": self._copy(f"{OWN}{key}", value) for key, value in own.items()}
        metadata = {
            "format": FORMAT,
            "progress": json.dumps(progress),
            "settings": json.dumps(self._settings, sort_keys=True),
            "chunks": json.dumps(chunks),
            "counts": json.dumps(dict(counts)),
        }
        path = partial / f"part-{self._ranks.rank}-of-{self._ranks.count}.safetensors"
        self._failure = None
        copied = None
        if self._ranks.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(path, tensors, metadata, copied))
        self._thread.start()

    def _partial(self) -> Path:
        return self._folder / f"{_PARTIAL}{step_folder(self._folder, self._step).name}"

    def _copied(self, shared: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this rank's share of the tensors, and of shards the full shape and their place in it."""
        tensors: dict[str, Tensor] = {}
        chunks: dict[str, Any] = {}
        for number, (key, value) in enumerate(shared.items()):
            if isinstance(value, DTensor):
                local, offset = chunk_of(value)
                if local.numel():
                    tensors[f"{SHARED}{key}"] = self._copy(f"{SHARED}{key}", local)
                    chunks[f"{SHARED}{key}"] = {"shape": list(value.shape), "offset": offset}
            elif number % self._ranks.count == self._ranks.rank:
                tensors[f"{SHARED}{key}"] = self._copy(f"{SHARED}{key}", value)
        return tensors, chunks

    def _copy(self, key: str, value: Tensor) -> Tensor:
        """Return a copy on the CPU, which from a GPU is complete only once the stream that runs has come so far."""
        value = value.detach()
        if value.device.type != "cuda":
            return value.clone(memory_format=torch.contiguous_format)
        place = self._locked_pages.get(key)
        if place is None or place.shape != value.shape or place.dtype != value.dtype:
            place = self._locked_pages[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return place.copy_(value, non_blocking=True)

    def _write(
        self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], copied: torch.cuda.Event | None
    ) -> None:
        def write() -> None:
            if copied is not None:
                copied.synchronize()
            path.parent.mkdir(parents=True, exist_ok=True)
            with system_errors():
                save_file(tensors, path, metadata)
            share_permissions(path)  # safetensors writes files that only their owner may read
            with ThreadPoolExecutor(1) as other:  # the checksum is computed while the disk is busy
                computed = other.submit(checksum, path)
                sync(path)
                write_atomically(_checksum_path(path), computed.result().encode())
            sync(path.parent)

        try:
            with writing(path):
                retry_with_backoff(write)
        except UserError as error:
            self._failure = error
        except Exception as error:  # a thread's error would be lost
            self._failure = UserError(f"cannot write {path} ({error!r})")

    def commit(self) -> None:
        """Wait for the checkpoint that was started, if any, publish it, and remove those that are no longer kept.

        A failure on any rank, such as a full disk, leaves the earlier checkpoints; the rank that failed raises its
        error, the others one that names it.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        try:
            self._ranks.raise_on_all(self._failure)
        except UserError:
            if self._ranks.leads:
                _remove_partial(self._folder)
            raise
        self._ranks.run_on_all_or_fail(self._publish if self._ranks.leads else lambda: None)

    def _publish(self) -> None:
        final, partial = step_folder(self._folder, self._step), self._partial()
        own, *others = part_paths(partial, self._ranks.count)
        if not own.is_file():  # it was written and synced
            raise UserError(f"cannot write {final} ({own} has disappeared): leave the folder alone or choose another")
        if lacking := [part.name for part in others if not part.is_file()]:
            raise UserError(f"{partial} lacks {lacking[0]}: --out must be a folder that all ranks share")

        def publish() -> None:
            if partial.exists():  # else this is another attempt, after the last rename
                if final.exists():  # this step again, as by another number of ranks
                    os.rename(final, self._folder / f"{_OLD}{final.name}")
                os.rename(partial, final)
            sync(self._folder)

        try:
            with writing(final):
                sums = {part.name: _checksum_path(part) for part in (own, *others)}
                write_manifest(partial, {name: path.read_text() for name, path in sums.items()})
                for path in sums.values():
                    path.unlink()
                retry_with_backoff(publish)
        except UserError:
            _recover(self._folder)
            raise
        _remove_partial(self._folder)
        steps = sorted(step_folders(self._folder), key=step_number)
        spared = {self._spared(step_number(path)) for path in steps[-self._keep :]}
        for path in steps[: -self._keep]:
            if step_number(path) not in spared:
                shutil.rmtree(path, ignore_errors=True)


def _checksum_path(part: Path) -> Path:
    """Return where a rank leaves the checksum of its part for the one that publishes the checkpoint."""
    return part.with_suffix(f".{CHECKSUM}")


def _recover(folder: Path) -> None:
    """Give back their names to steps that were being replaced when a process ended."""
    for path in folder.glob(f"{_OLD}*"):
        final = folder / path.name.removeprefix(_OLD)
        if not final.exists():
            os.rename(path, final)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
