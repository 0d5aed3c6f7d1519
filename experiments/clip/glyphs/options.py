"""Options of the commands that belong to the embedded glyphs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..cli.options import SHIPPED_REFERENCE, Captions, Data


@dataclass(frozen=True)
class Demo:
    """Train a steered model and its unsteered twin, evaluate both and the reference, write a report."""

    quick: bool = False
    """A small run, of two minutes on 2 cores: a smaller model and batch, and 2 epochs instead of 9."""
    captions: Captions = "swapped"
    """What the training captions say: the names, a random half of each name's words, or 40 % exchanged."""
    cache: Path = Path("cache")
    """Folder of shards and reference features; it can be moved."""
    out: Path = Path("outputs/demo")
    """Folder of checkpoints, models and report; what is there is reused."""
    reference: Path = SHIPPED_REFERENCE
    """Folder of the reference model, in open_clip's local-dir layout."""
    seed: int = 0
    """Seed of initial weights and order of the pairs, the same for both models."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


@dataclass(frozen=True)
class GlyphTasks:
    """Write the held-out glyph pairs as zero-shot tasks in CLIP_benchmark's layout."""

    data: Data = field(default_factory=Data)
    out: Path = Path("glyph-tasks")
    """Folder of the tasks."""
