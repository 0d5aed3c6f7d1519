"""Pictures by description: the features of all pictures are computed once, a query is one more and a product."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..cli.options import Data
from ..cli.sources import Shown, open_shared_catalog, read_image, shown_samples
from ..cli.terminal import console
from ..distributed import ONE_PROCESS
from ..errors import COMMAND, UserError
from ..glyphs.dataset import open_dataset
from ..glyphs.source import catalog_of, features_of
from ..models.clip import Clip, load_model
from .options import Search
from .sheet import Cell, draw_sheet
from .source import dataset_folder

_COLUMNS = 8
# The field says that the member `json` is read, of which all is shown.
_CAPTIONS = ("txt", "json:license")


class Found(NamedTuple):
    """A picture that was found, by its number in the catalog, and the cosine of its feature with the query's."""

    sample: int
    score: float
    shown: Shown


class Index:
    """The pictures of a data set with a model's features of them.

    Parameters
    ----------
    clip : Clip
        The model, in evaluation mode.
    catalog : Path, optional
        A folder that `run.py catalog` made; without it, the prepared icons.
    splits : sequence of str
        Which of the icons; all by default.
    """

    def __init__(self, clip: Clip, data: Data, catalog: Path | None = None, splits: Sequence[str] = ()) -> None:
        self._clip = clip
        if catalog is None:
            folder = dataset_folder(data)
            manifest = open_dataset(folder)
            if manifest is None:
                raise UserError(f"there are no icons in {folder}: run {_command(data)}")
            place = data.cache / "-".join(["search", manifest.fingerprint[:12], *splits])
            self.catalog = catalog_of(manifest, splits or tuple(manifest.splits), place, _CAPTIONS)
        else:
            self.catalog = open_shared_catalog(catalog, ONE_PROCESS)
        parts = list(features_of(clip, self.catalog, data.cache).parts())
        self._indices = torch.cat([indices for indices, _, _ in parts])  # [n]
        self._images = torch.cat([images for _, images, _ in parts])  # [n, d]

    def __len__(self) -> int:
        return len(self._indices)

    def find(self, query: str | Image.Image, count: int) -> list[Found]:
        """Return the ``count`` pictures whose features have the largest cosines with the query's, best first.

        Raises
        ------
        UserError
            If there are fewer pictures.
        """
        if count > len(self):
            raise UserError(f"--top {count} is more than the {len(self)} pictures that there are: ask for fewer")
        best = (self._images @ self._feature(query)).topk(count)
        indices = self._indices[best.indices].tolist()
        return [
            Found(sample, score, shown)
            for sample, score, shown in zip(
                indices, best.values.tolist(), shown_samples(self.catalog, indices), strict=True
            )
        ]

    @torch.no_grad()
    def _feature(self, query: str | Image.Image) -> Tensor:  # [d]
        if isinstance(query, str):
            return self._clip.encode_text([query])[0].float().cpu()
        return self._clip.encode_image(self._clip.preprocess(query)[None])[0].float().cpu()


def _command(data: Data) -> str:
    words = [f"--pixels {data.pixels}"] * (data.pixels != 64) + [f"--size {data.size}"] * (data.size != "full")
    words += [f"--cache {data.cache}"] * (data.cache != Data().cache)
    return " ".join([f"`{COMMAND} prepare --data icons", *words]) + "`"


def run_search(options: Search) -> None:
    """Find pictures, write them as a sheet and print what they are."""
    picture = None if options.image is None else read_image(options.image)
    clip = load_model(options.model, options.weights)
    index = Index(clip, options.data, options.catalog)
    start = time.perf_counter()
    found = index.find(options.query if picture is None else picture, options.top)
    seconds = time.perf_counter() - start
    for number, each in enumerate(found, 1):
        console.print(f"{number:4d}  {each.score:.3f}  {'  '.join(lines_of(each.shown))}")
    asked = f"“{options.query}”" if options.image is None else f"like {options.image.name}"
    sheet = draw_sheet([(asked, [cell_of(each) for each in found])], min(_COLUMNS, len(found)))
    _save(sheet, options.out)
    console.print(f"search     {seconds:.2f} s over {len(index)} pictures; the {len(found)} best are in {options.out}")


def cell_of(found: Found) -> Cell:
    """Return a picture with its name, its score and where it is from."""
    name, *more = lines_of(found.shown)
    return Cell(found.shown.image, (name, " ".join([f"{found.score:.2f}", *more[:1]]), *more[1:]))


def lines_of(shown: Shown) -> list[str]:
    """Return a picture's caption and, of an icon, its set and license."""
    details: dict[str, Any] = shown.details
    return [shown.caption, *(str(details[key]) for key in ("set", "license") if key in details)]


def _save(sheet: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG", optimize=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}): choose another file") from error
