"""What grids are made of: a training with its labels, and the settings that tuning found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..cli.options import Data, Train
from .settings import Setting


@dataclass(frozen=True)
class Cell:
    """One training, with all its options, and the labels of its row.

    Attributes
    ----------
    method : str
        What tables call its training method.
    train : Train
        Its options; --out, --cache and --logs are the study's.
    setting : str
        What else tells it from its neighbors, like ``tau=0.1``.
    reference : str
        A name in `studies.REFERENCES`: that model, which the study trains, steers instead of ``train.loss.reference``.
    """

    method: str
    train: Train
    setting: str = ""
    reference: str = ""


class TunedKey(NamedTuple):
    """A tuning study, captions, a method, and the trained reference that steers it (that of `Cell`)."""

    study: str
    captions: str
    method: str
    reference: str = ""


#: The settings that tuning found best.
Tuned = Mapping[TunedKey, Setting]


def reference_cell(name: str, train: Train) -> Cell:
    """Return the training of a reference, whose name is its setting."""
    return Cell(train.loss.method, train, name)


def captions_label(data: Data) -> str:
    """Return what tables call the training captions."""
    if data.kind == "glyphs":
        return data.captions
    return f"swapped-{round(100 * data.swapped)}" if data.swapped else "natural"
