"""Where training pairs come from: webdataset shards, tables of image paths, or made-up pairs for speed tests."""

from __future__ import annotations

import csv
import glob
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from experiments.clip.errors import UserError
from experiments.clip.io.storage import filesystem, is_remote

PIPE = "pipe:"
_TABLES = (".csv", ".tsv", ".parquet")
_SYNTHETIC = "synthetic:"
# A row after the last one, which a quote that is not closed would swallow.
_END = "\x1c"


@dataclass(frozen=True)
class Shards:
    """Tar files in webdataset's layout.

    ``pattern`` is a path or a URL that fsspec knows, with braces (``{00000..00099}.tar``) or, where it has none of
    those, wildcards; or ``pipe:`` and a shell command that writes a tar file.
    """

    pattern: str


@dataclass(frozen=True)
class Table:
    """A CSV, TSV or parquet file with a column of image paths and columns of captions.

    Relative image paths start at ``root``, by default the table's folder. ``separator`` is found from the header line
    if not given. Column names default to open_clip's.
    """

    path: str
    image: str = "filepath"
    captions: tuple[str, ...] = ("title",)
    separator: str = ""
    root: str = ""


@dataclass(frozen=True)
class Synthetic:
    """Made-up pairs, for speed tests: images of one shade, ``pixels`` wide and high, and captions with the index."""

    samples: int
    pixels: int = 224


Source = Shards | Table | Synthetic


def parse_sources(sources: str | Path | Source | Sequence[str | Path | Source]) -> list[Source]:
    """Return the sources that the user named.

    One string may hold several, joined by ``::`` as open_clip has it; the entries of a list are taken as they are (so
    fsspec's chained URLs, which have ``::`` too, can be given in a list). A name that ends in .csv, .tsv or .parquet
    is a `Table`; ``synthetic:N`` makes N pairs up, ``synthetic:N:P`` of P x P pixels.
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
        if not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and 0 < int(n) <= 10**12 for n in numbers):
            raise UserError(f"the data {text!r} must be synthetic:SAMPLES or synthetic:SAMPLES:PIXELS")
        return Synthetic(*map(int, numbers))
    if Path(text).suffix.lower() in _TABLES:
        return Table(text)
    return Shards(text)


def parse_weights(text: str, sources: int) -> list[float]:
    """Parse open_clip's ``--train-data-upsampling-factors``: a number for each source, joined by ``::``."""
    try:
        weights = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(f"the weights {text!r} must be numbers joined by ::, like 1::2") from None
    if len(weights) != sources:
        raise UserError(f"there are {len(weights)} weights, {text!r}, for {sources} sources: give one for each")
    return weights


def expand(pattern: str) -> list[str]:
    """Return the shards that a pattern stands for: absolute paths, or URLs, in the pattern's order.

    A path that exists is itself, whatever characters it has. Wildcards give what exists, sorted.
    """
    if not pattern:
        raise UserError("a source has no name: remove the :: beside it")
    if not is_remote(pattern) and not pattern.startswith(PIPE) and os.path.exists(pattern):
        if os.path.isdir(pattern):
            raise UserError(f"{pattern} is a folder: name its tar files, like {pattern.rstrip('/')}/*.tar")
        return [os.path.abspath(pattern)]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the braces of {pattern!r} do not match: write them like {{00000..00099}}") from error
    if pattern.startswith(PIPE):
        return names
    shards = [shard for name in names for shard in _matches(name)]
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(shard)]
    if missing or not shards:
        what = f"{len(missing)} of its {len(shards)} shards are missing, {missing[0]} first" if missing else "nothing"
        raise UserError(f"the data {pattern!r} cannot be used ({what} found): correct the pattern")
    return shards


def _matches(name: str) -> list[str]:
    if is_remote(name):
        if "*" not in name:
            return [name]
        fs, inner = filesystem(name)
        return [fs.unstrip_protocol(path) for path in sorted(fs.glob(inner))]
    if os.path.exists(name) or not glob.has_magic(name):
        return [os.path.abspath(name)]
    return sorted(os.path.abspath(path) for path in glob.glob(name, recursive=True))


def table_rows(table: Table) -> Iterator[tuple[str, list[str | None]]]:
    """Yield image path and captions of every row as they are written, "" and None where a row lacks them."""
    return _parquet_rows(table) if table.path.lower().endswith(".parquet") else _text_rows(table)


def _text_rows(table: Table) -> Iterator[tuple[str, list[str | None]]]:
    line = 1
    try:
        # What is not UTF-8 is found by who reads the caption.
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
        raise UserError(f"the table {table.path} breaks off at line {line} ({error}): mend it") from error
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
