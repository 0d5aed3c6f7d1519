"""Sources of training pairs: tar files in webdataset's layout, tables of image paths, made-up pairs for speed tests."""

from __future__ import annotations

import csv
import glob
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar

from braceexpand import braceexpand

from experiments.clip.errors import UserError
from experiments.clip.io.storage import is_remote, matching

PIPE = "pipe:"
_TABLES = (".csv", ".tsv", ".parquet")
_SYNTHETIC = "synthetic:"
_MOST_SYNTHETIC, _MOST_PIXELS, _MOST_NAMES = 10**10, 10_000, 5_000_000
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,300})\.\.(-?\d{1,300})(?:\.\.(-?\d{1,300}))?")
# A row that is added after the last one: a quote that is not closed would include it.
_END = "\x1c"


@dataclass(frozen=True)
class TarPattern:
    """Tar files in webdataset's layout, given by a pattern.

    ``pattern`` is a path or a URL that fsspec knows, with braces (``{00000..00099}.tar``) or, if it has no braces,
    wildcards; or ``pipe:`` and a shell command that writes a tar file.
    """

    #: What a catalog's file calls this kind of source.
    kind: ClassVar[str] = "shards"
    pattern: str


@dataclass(frozen=True)
class Table:
    """A CSV, TSV or parquet file with a column of image paths and columns of captions.

    Relative image paths start at ``root``, by default the table's folder. ``separator`` is determined from the header
    line if it is not given. The default column names are open_clip's.
    """

    kind: ClassVar[str] = "table"
    path: str
    image: str = "filepath"
    captions: tuple[str, ...] = ("title",)
    separator: str = ""
    root: str = ""


@dataclass(frozen=True)
class Synthetic:
    """Made-up pairs, for speed tests: images of one shade, ``pixels`` wide and high, and captions with the index."""

    kind: ClassVar[str] = "synthetic"
    samples: int
    pixels: int = 224


Source = TarPattern | Table | Synthetic


def parse_sources(sources: str | Path | Source | Sequence[str | Path | Source]) -> list[Source]:
    """Return the sources that the user named.

    A string may name several, joined by ``::`` as in open_clip. The entries of a list name one each, so that fsspec's
    chained URLs, which contain ``::``, can be given in a list. A name that ends in .csv, .tsv or .parquet is a `Table`;
    ``synthetic:N`` is N made-up pairs, ``synthetic:N:P`` of P x P pixels; every other name is a `TarPattern`.
    """
    if isinstance(sources, str) and not sources.startswith(PIPE):
        sources = sources.split("::")
    elif not isinstance(sources, Sequence) or isinstance(sources, str):
        sources = [sources]
    parsed = [_parse(source) if isinstance(source, str | Path) else source for source in sources]
    if not parsed:
        raise UserError("no data is named: give a pattern of tar files, like data/{00000..00099}.tar")
    return parsed


def _parse(source: str | Path) -> Source:
    text = str(source)
    if text.startswith(_SYNTHETIC):
        numbers = text.removeprefix(_SYNTHETIC).split(":")
        # Of 5,000 digits or more, Python makes no number.
        if not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and 0 < int(n[:20]) for n in numbers):
            raise UserError(f"the data {text[:80]!r} must be synthetic:SAMPLES or synthetic:SAMPLES:PIXELS")
        for number, most, what in zip(numbers, (_MOST_SYNTHETIC, _MOST_PIXELS), ("samples", "pixels"), strict=False):
            if len(number) > 20 or int(number) > most:
                raise UserError(f"the data {text[:80]!r} have more than {most} {what}: make up fewer")
        return Synthetic(*map(int, numbers))
    if Path(text).suffix.lower() in _TABLES:
        return Table(text)
    return TarPattern(text)


def parse_weights(text: str, sources: int) -> list[float]:
    """Parse a weight for each source, joined by ``::`` as in open_clip's ``--train-data-upsampling-factors``."""
    try:
        weights = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(f"the weights {text!r} must be numbers joined by ::, like 1::2") from None
    if len(weights) != sources:
        raise UserError(f"there are {len(weights)} weights, {text!r}, for {sources} sources: give one for each")
    return weights


def expand(pattern: str) -> list[str]:
    """Return the tar files that a pattern names, as absolute paths or URLs in the pattern's order.

    A path that exists names itself, whatever characters it contains. Wildcards name the files that exist, sorted.
    """
    if not pattern:
        raise UserError("a source has no name: remove the :: next to it")
    if not is_remote(pattern) and not pattern.startswith(PIPE) and os.path.exists(pattern):
        if os.path.isdir(pattern):
            raise UserError(f"{pattern} is a folder: name its tar files, like {pattern.rstrip('/')}/*.tar")
        return [os.path.abspath(pattern)]
    if (count := _expansions(pattern)) > _MOST_NAMES:
        raise UserError(
            f"the braces of {pattern[:80]!r} stand for {count:.3g} names, more than {_MOST_NAMES}: name fewer"
        )
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the braces of {pattern[:80]!r} do not match: write them like {{00000..00099}}") from error
    if pattern.startswith(PIPE):
        return names
    paths = [path for name in names for path in _matches(name)]
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"the data {pattern!r} cannot be used: {len(missing)} of its {len(paths)} files are missing, the first is "
            f"{missing[0]}: correct the pattern"
        )
    if not paths:
        raise UserError(f"the data {pattern!r} cannot be used: no file matches: correct the pattern")
    return paths


def _expansions(pattern: str) -> float:
    """Return how many names the braces of a pattern stand for, at most."""
    count = 1.0
    while (group := _INNERMOST.search(pattern)) is not None:
        ends = _RANGE.fullmatch(group[1])
        if ends is None:
            count *= group[1].count(",") + 1
        else:
            first, last, step = (float(each or 1) for each in ends.groups())
            count *= abs(last - first) / max(1.0, abs(step)) + 1
        pattern = pattern[: group.start()] + pattern[group.end() :]
    return count


def _matches(name: str) -> list[str]:
    if is_remote(name):
        if "*" not in name:
            return [name]
        return matching(name)
    if os.path.exists(name) or not glob.has_magic(name):
        return [os.path.abspath(name)]
    return sorted(os.path.abspath(path) for path in glob.glob(name, recursive=True))


def table_rows(table: Table) -> Iterator[tuple[str, list[str | None]]]:
    """Yield image path and captions of every row as they are written; "" and None if a row lacks them."""
    return _parquet_rows(table) if table.path.lower().endswith(".parquet") else _text_rows(table)


def _text_rows(table: Table) -> Iterator[tuple[str, list[str | None]]]:
    line = 1
    try:
        # Captions that are not UTF-8 are reported when they are decoded.
        with open(table.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            wanted = [table.image, *table.captions]
            separators = [table.separator] if table.separator else ["\t", ",", ";", "|"]
            for separator in separators:
                names = next(csv.reader([header], delimiter=separator), [])
                if set(wanted) <= set(names):
                    break
            else:
                raise _no_columns(table, header.strip())
            places = [names.index(name) for name in wanted]
            reader = csv.reader(chain(file, [_END]), delimiter=separator)
            row: list[str] = []
            start = line = 2
            for following in reader:
                if row:
                    image, *captions = (row[place] if place < len(row) else None for place in places)
                    yield image or "", captions
                row, start, line = following, line, reader.line_num + 2
            if row != [_END]:
                line = start
                raise csv.Error("a quote is not closed")
    except csv.Error as error:
        raise UserError(f"the table {table.path} breaks off at line {line} ({error}): correct it") from error
    except OSError as error:
        raise UserError(f"cannot read the table {table.path} ({error.strerror})") from error


def _parquet_rows(table: Table) -> Iterator[tuple[str, list[str | None]]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"reading {table.path} needs pyarrow: pip install pyarrow, or save it as CSV") from error
    try:
        with parquet.ParquetFile(table.path) as file:
            wanted = [table.image, *table.captions]
            if not set(wanted) <= set(file.schema_arrow.names):
                raise _no_columns(table, ", ".join(file.schema_arrow.names))
            for batch in file.iter_batches(columns=wanted):
                columns = [[str(v) if v is not None else None for v in batch[name].to_pylist()] for name in wanted]
                for image, *captions in zip_longest(*columns):
                    yield image or "", captions
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the table {table.path} ({reason}): make it again") from error


def _no_columns(table: Table, header: str) -> UserError:
    wanted = ", ".join((table.image, *table.captions))
    return UserError(f"the table {table.path} must have the columns {wanted}, its header is {header[:200]!r}")
