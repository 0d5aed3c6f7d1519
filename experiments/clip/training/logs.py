"""Where the numbers of a run go: lines of JSON, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.clip.errors import UserError
from experiments.clip.io.files import append_line

LogName = Literal["jsonl", "tensorboard", "wandb"]


class Logs:
    """Writers of one run's numbers; a run that goes on appends.

    Parameters
    ----------
    folder : Path
        Where ``log.jsonl`` and TensorBoard's events go.
    names : sequence of str
        Which to write.
    settings : dict
        The run's settings, for wandb.
    """

    def __init__(self, folder: Path, names: Sequence[LogName], settings: dict[str, Any]) -> None:
        self._lines = folder / "log.jsonl" if "jsonl" in names else None
        self._board = self._wandb = None
        if "tensorboard" in names:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--logs tensorboard needs the package tensorboard: pip install tensorboard") from None
            self._board = SummaryWriter(folder / "tensorboard")
        if "wandb" in names:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError("--logs wandb needs the package wandb: pip install wandb") from None
            self._wandb = wandb.init(project="drrho", dir=folder, config=settings, resume="allow", id=folder.name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers after a step."""
        if self._lines is not None:
            append_line(self._lines, json.dumps({"step": step, **values}))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
