"""All studies of all data sets by name, the references that they train, and what their methods are tuned over."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, MutableMapping

from ..cli.options import Train
from . import grid, icon_grid
from .cells import Cell, Tuned, TunedKey
from .options import Grid
from .settings import Setting, settings_of

Studies = MutableMapping[str, Callable[[Tuned], Iterable[Cell]]]

STUDIES_OF: dict[Grid, Studies] = {
    "glyphs": grid.STUDIES,
    "icons": icon_grid.STUDIES,
    "icons-large": icon_grid.GPU_STUDIES,
}
STUDIES: Studies = ChainMap(*STUDIES_OF.values())
REFERENCES: MutableMapping[str, Train] = ChainMap(grid.REFERENCES, icon_grid.REFERENCES, icon_grid.GPU_REFERENCES)
#: The study of each whose models are kept.
REFERENCE_STUDY_OF: dict[Grid, str] = {
    "glyphs": "references",
    "icons": "icon-references",
    "icons-large": "gpu-icon-references",
}
#: The studies that choose settings; they use no tuned setting themselves.
TUNING_STUDIES_OF: dict[Grid, tuple[str, ...]] = {
    "glyphs": grid.TUNING_STUDIES,
    "icons": icon_grid.TUNING_STUDIES,
    "icons-large": icon_grid.GPU_TUNING_STUDIES,
}


def tried_settings(key: TunedKey) -> tuple[Setting, ...]:
    """Return what a tuning study tries."""
    if key.study == "icon-tuning-public":
        return icon_grid.PUBLIC_SETTINGS
    if key.study in (*icon_grid.TUNING_STUDIES, *icon_grid.GPU_TUNING_STUDIES):
        return icon_grid.SETTINGS.get(key.method, ())
    return settings_of(key.method, key.reference)
