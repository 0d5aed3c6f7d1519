"""Training state in safetensors files, one folder per step; never pickle.

``step-00000120/`` holds ``part-K-of-N.safetensors``: what rank K has of the model, optimizer and averages (its shards
where they are sharded, every N-th tensor where all ranks have them) and its own rows of running state. A step's folder
is written under another name and renamed when every rank is done, so that a folder of this name is complete. Its
``manifest.json`` has the checksums of the parts: what a disk has changed since, or parts of two steps, are damage, and
the run resumes from the checkpoint before. A run on any number of ranks can resume: each rank reads the rows it keeps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..distributed import Ranks
from ..errors import UserError
from ..io.checksums import fault_of, has_manifest
from ..io.files import retry_with_backoff, writing

#: What a checkpoint holds and under which names; another number where that changes.
FORMAT = "3"

_STEP = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"part-(\d+)-of-(\d+)\.safetensors")
SHARED, OWN = "shared/", "own/"
MODEL, _OPTIMIZER = "model.", "optimizer."
_OF = "|"  # between a parameter's name and the optimizer's
# Settings that a run may have otherwise than the one whose state it goes on from.
_MAY_DIFFER = frozenset(
    "epochs lr lr_min betas adam_eps momentum weight_decay schedule warmup cooldown_steps cooldown_power clip_norm "
    "accumulation validations patch_dropout final_gamma gamma_epochs temperature_lr temperature_lr_schedule "
    "resume".split()
)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last finished step, if there is one."""
    return max(step_folders(folder), key=step_number, default=None)


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of finished steps."""
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []


def step_number(path: Path) -> int:
    """Return the number of finished steps of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps is kept."""
    return folder / f"step-{step:08d}"


def chosen_checkpoint(path: Path, option: str) -> Path:
    """Return the checkpoint that is named, or the last one of the run that is named."""
    if path.name.startswith("step-") and path.is_dir():
        return path.absolute()
    found = latest_checkpoint(path / "checkpoints")
    if found is None:
        raise UserError(f"{option} {path} has no checkpoint: name the folder of a run, or of one of its checkpoints")
    return found.absolute()


class Damaged(UserError):
    """A checkpoint's files are not as they were written."""


class SetAside(NamedTuple):
    """A damaged checkpoint: where it was, where it is now, and what is wrong with it."""

    path: Path
    moved_to: Path
    fault: str


def set_aside_damaged(folder: Path, ranks: Ranks) -> list[SetAside]:
    """Rename the last checkpoints that are damaged, so that a run resumes from the last sound one (collective).

    Every rank reads its part of the files.

    Raises
    ------
    UserError
        If none is sound of those that there are, or if one cannot be read.
    """
    found: list[SetAside] = []
    while (path := latest_checkpoint(folder)) is not None:
        # A changed bit may be one of the format's number: what a part says of itself is believed once all are sound.
        for look in (_fault_of_files, _fault_of_content):
            fault = ranks.run_on_all_or_fail(lambda path=path, look=look: look(path, ranks))
            if is_damaged := ranks.max_over_ranks(int(bool(fault))):
                break
        if not is_damaged:
            return found
        moved_to = folder / f"damaged-{path.name}"
        found.append(SetAside(path, moved_to, fault or "another rank found it"))
        ranks.run_on_all_or_fail(lambda path=path, to=moved_to: _rename(path, to) if ranks.leads else None)
        ranks.wait()
    if found:
        last = found[-1]
        raise UserError(
            f"checkpoint {last.path} is damaged ({last.fault}), and there is none before it: start anew in another "
            f"--out; what is left of it is in {last.moved_to}"
        )
    if earlier := sorted(folder.glob("damaged-step-*")):  # the command was given again
        raise UserError(
            f"the last checkpoint is damaged, {earlier[0]}, and there is no other: start anew in another --out"
        )
    return found


def check_sound(path: Path) -> None:
    """Raise `Damaged` if the checkpoint's files are not as they were written."""
    if fault := _fault_of_files(path, Ranks()) or _fault_of_content(path, Ranks()):
        raise Damaged(f"checkpoint {path} is damaged ({fault}): delete it, or copy it again")


def _fault_of_files(path: Path, ranks: Ranks) -> str:
    """Return what is wrong with this rank's share of a checkpoint's files, empty if nothing is."""
    try:
        if not has_manifest(path):
            Checkpoint(path)  # which may be of another version, and says so
        return guarded(path, lambda: fault_of(path, [each.name for each in files_of(path)], ranks.rank, ranks.count))
    except Damaged as error:
        return str(error.__cause__)


def _fault_of_content(path: Path, ranks: Ranks) -> str:
    """Return what is wrong with what the files say of themselves, empty if nothing is."""
    try:
        Checkpoint(path)
    except Damaged as error:
        return str(error.__cause__)
    return ""


def _rename(path: Path, to: Path) -> None:
    with writing(to):
        if to.exists():
            shutil.rmtree(to)
        os.rename(path, to)


def chunk_of(value: Tensor) -> tuple[Tensor, list[int]]:
    """Return what this rank has of a tensor, and where that begins in the full tensor."""
    if not isinstance(value, DTensor):
        return value, [0] * value.ndim
    [chunk] = value.__create_chunk_list__()
    return value.to_local(), list(chunk.offsets)


def part_paths(folder: Path, count: int) -> list[Path]:
    """Return the files of all ranks in a step's folder."""
    return [folder / f"part-{rank}-of-{count}.safetensors" for rank in range(count)]


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise the error of the file system that is behind one of safetensors, where there is one."""
    try:
        yield
    except SafetensorError as error:
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and optimizer state by name: the tensors themselves, not copies; shards where they are sharded."""
    state = _model_state(model)
    if not optimizer.state:  # torch would make one, by a step of rate 0 that counts as a step
        return state
    for name, values in _optimizer_state(model, optimizer)["state"].items():
        for key, value in values.items():
            state[f"{_OPTIMIZER}{name}{_OF}{key}"] = torch.as_tensor(value)
    return state


def _model_state(model: torch.nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = get_model_state_dict(model)
    return {f"{MODEL}{key}": value for key, value in found.items()}


def _optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    return {"state": {}, **found}


def files_of(path: Path) -> list[Path]:
    """Return the files of all ranks in a step's folder, in order; a missing one is an error."""
    found = [match for each in path.iterdir() if (match := _PART.fullmatch(each.name))]
    counts = sorted({int(match[2]) for match in found}) or [1]
    if len(counts) > 1:
        raise ValueError(f"it has parts of {counts[0]} and of {counts[1]} ranks")
    return part_paths(path, counts[0])


def guarded(path: Path, action: Callable[[], Any]) -> Any:
    """Return what an action that reads the checkpoint returns; its errors become those of the checkpoint."""

    def attempt() -> Any:
        with system_errors():
            return action()

    try:
        return retry_with_backoff(attempt)
    except (SafetensorError, FileNotFoundError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"checkpoint {path} is damaged ({error}): resume from the one before") from error
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path} ({error.strerror}): check the storage, then resume") from error


class _Piece(NamedTuple):
    """What a file has of a tensor."""

    file: Any
    key: str
    offset: list[int]
    shape: list[int]


class Checkpoint:
    """A step's folder, mapped into memory.

    Attributes
    ----------
    progress, settings : dict
        As they were saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._own: list[tuple[Any, list[str]]] = []
        self._counts: list[dict[str, int]] = []
        self.progress: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        guarded(self._path, self._open)

    def _open(self) -> None:
        self._pieces, self._shapes, self._own, self._counts = {}, {}, [], []  # it may be another attempt
        for part in files_of(self._path):
            file = safe_open(part, "pt")
            metadata = file.metadata()
            if (stored := metadata.get("format")) != FORMAT:
                raise UserError(
                    f"checkpoint {self._path} has format {stored}, this program reads {FORMAT}: resume with the "
                    "version that wrote it, or start anew in another --out"
                )
            chunks = json.loads(metadata["chunks"])
            self._counts.append(json.loads(metadata["counts"]))
            self.progress, self.settings = json.loads(metadata["progress"]), json.loads(metadata["settings"])
            if self.progress["step"] != step_number(self._path):
                raise ValueError(f"{part.name} is of step {self.progress['step']}")
            own: list[str] = []
            for key in file.keys():
                if key.startswith(OWN):
                    own.append(key)
                    continue
                shape = file.get_slice(key).get_shape()
                chunk = chunks.get(key, {"shape": shape, "offset": [0] * len(shape)})
                name = key.removeprefix(SHARED)
                self._pieces.setdefault(name, []).append(_Piece(file, key, chunk["offset"], shape))
                self._shapes[name] = chunk["shape"]
            self._own.append((file, own))

    def has(self, prefix: str) -> bool:
        """Whether there is a tensor whose name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self._pieces)

    @property
    def own(self) -> list[dict[str, Tensor]]:
        """Return every rank's own tensors, in order; rows that are not read stay on the disk."""
        return guarded(
            self._path,
            lambda: [{key.removeprefix(OWN): file.get_tensor(key) for key in keys} for file, keys in self._own],
        )

    @property
    def counts(self) -> list[dict[str, int]]:
        """Return every rank's own counts, in order."""
        return self._counts

    def full_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with ``prefix``, from all ranks' parts, by the rest of their names."""
        names = [name for name in self._pieces if name.startswith(prefix)]
        found = {name.removeprefix(prefix): guarded(self._path, lambda name=name: self._empty(name)) for name in names}
        self.fill({f"{prefix}{key}": value for key, value in found.items()})
        return found

    def _empty(self, name: str) -> Tensor:
        first = self._pieces[name][0]
        return first.file.get_tensor(first.key).new_empty(self._shapes[name])

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, each rank what it has of sharded ones.

        Raises
        ------
        UserError
            If the checkpoint lacks one, or a part of one.
        """
        for name, value in tensors.items():
            guarded(self._path, lambda name=name, value=value: self._fill(name, value))

    @torch.no_grad()
    def _fill(self, name: str, value: Tensor) -> None:
        local, offset = chunk_of(value)
        if name not in self._pieces:
            raise ValueError(f"{name} is not in it")
        if value.numel() == 1 and self._pieces[name][0].shape in ([], [1]):
            # A single number, the logit scale, has shape [1] where parameters are sharded and none elsewhere.
            if local.numel():
                piece = self._pieces[name][0]
                local.copy_(piece.file.get_tensor(piece.key).reshape(local.shape))
            return
        if list(value.shape) != self._shapes[name]:
            raise ValueError(f"{name} has shape {self._shapes[name]}, not {list(value.shape)}")
        copied = 0
        for piece in self._pieces[name]:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            ends = zip(offset, local.shape, piece.offset, piece.shape, strict=True)
            high = [min(a + length, b + size) for a, length, b, size in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            found = piece.file.get_slice(piece.key)[there] if there else piece.file.get_tensor(piece.key)
            local[here].copy_(found)
            copied += found.numel()
        if copied != local.numel():
            raise ValueError(f"{name} has {copied} numbers of the {local.numel()} that this rank keeps")


def restore_training(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state in place."""
    state = _optimizer_state(model, optimizer)  # made by a step of rate 0, if there was none yet
    parameters = dict(model.named_parameters())
    for name, values in state["state"].items():
        own = optimizer.state[parameters[name]]
        if not checkpoint.has(f"{_OPTIMIZER}{name}{_OF}"):  # a parameter that had no gradient yet
            del optimizer.state[parameters[name]]
            continue
        for key, value in values.items():
            found = torch.as_tensor(value)
            checkpoint.fill({f"{_OPTIMIZER}{name}{_OF}{key}": found})
            if not isinstance(value, Tensor):
                own[key] = found.item()
    checkpoint.fill(_model_state(model))


def check_settings(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a result made with other settings, naming the first that differs."""
    for key in sorted(stored.keys() | settings.keys()):
        if stored.get(key) != settings.get(key):
            others = ", or go on from it by --resume in another one" if key in _MAY_DIFFER else ""
            raise UserError(
                f"{path} was made with {key}={stored.get(key)}, now it is {settings.get(key)}: "
                f"choose another --out or delete that folder{others}"
            )


def check_continued(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on from another run's state with settings that give the state another meaning."""
    for key in sorted((stored.keys() | settings.keys()) - _MAY_DIFFER):
        if stored.get(key) != settings.get(key):
            raise UserError(
                f"--resume {path} was made with {key}={stored.get(key)}, now it is {settings.get(key)}: only "
                f"{', '.join(sorted(_MAY_DIFFER - {'resume'}))} may be others"
            )
