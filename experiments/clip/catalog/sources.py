"""Sources of training pairs: tar files in webdataset's layout, tables of image paths, made-up pairs for speed tests."""

from __future__ import annotations

import csv
import glob
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar

from braceexpand import braceexpand

from ..errors import UserError
from ..io.storage import is_remote, matching

PIPE = "pipe:"
_TABLES = (".csv", ".tsv", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_SEPARATORS = {"tab": "\t", "\\t": "\t"}
_SYNTHETIC = "synthetic:"
_MOST_SYNTHETIC, _MOST_PIXELS, _MOST_NAMES = 10**10, 10_000, 5_000_000
# Protocols of fsspec that read what the URL after the next :: names.
_CHAINED = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached", "reference", "dir")
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,300})\.\.(-?\d{1,300})(?:\.\.(-?\d{1,300}))?")
# Characters of a field of a table, the csv module's default being 131,072; and of a path.
_LONGEST_FIELD, _LONGEST_PATH = 2**26, 4096
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
#: What a row of a table has of a column of captions: one, several, or none.
Caption = str | list[str] | None


def parse_sources(sources: str | Path | Source | Sequence[str | Path | Source]) -> list[Source]:
    """Return the sources that the user named.

    A string may name several, joined by ``::`` as in open_clip; an URL that fsspec chains, like
    ``zip://*.tar::s3://bucket/shards.zip``, is one. A name that ends in .csv, .tsv or .parquet is a `Table`;
    ``synthetic:N`` is N made-up pairs, ``synthetic:N:P`` of P x P pixels; every other name is a `TarPattern`.
    """
    if isinstance(sources, str) or not isinstance(sources, Sequence):
        sources = [sources]
    parsed: list[Source] = []
    for source in sources:
        names = _split(source) if isinstance(source, str) else [source]
        parsed += [_parse(name) if isinstance(name, str | Path) else name for name in names]
    if not parsed:
        raise UserError("no data is named: give a pattern of tar files, like data/{00000..00099}.tar")
    return parsed


def _split(text: str) -> list[str]:
    """Return the sources that a string names; a path that exists is one, whatever characters it contains."""
    if text.startswith(PIPE) or os.path.exists(text):
        return [text]
    names: list[str] = []
    is_within_chain = False
    for part in text.split("::"):
        if is_within_chain:
            names[-1] += f"::{part}"
        else:
            names.append(part)
        is_within_chain = part.partition("://")[0] in _CHAINED
    return names


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


def with_columns(
    sources: Sequence[Source], image: Sequence[str], captions: Sequence[str], separator: str
) -> list[Source]:
    """Return sources with the columns and the separator of tables that the user named; what is empty stays."""
    separator = _SEPARATORS.get(separator, separator)
    tables = [source for source in sources if isinstance(source, Table)]
    if separator and not tables:
        raise UserError(f"--separator {separator!r} is for tables, and no source ends in {', '.join(_TABLES)}")
    if len(separator) > 1 or separator in ("\n", "\r", '"'):
        raise UserError(f"--separator must be one character or tab, got {separator[:20]!r}")
    if tables and len(image) > 1:
        raise UserError(f"--image-key {' '.join(image)}: a table has its paths in one column, name that")
    own: dict[str, Any] = {"image": "".join(image), "captions": tuple(captions), "separator": separator}
    own = {name: value for name, value in own.items() if value}
    return [replace(source, **own) if isinstance(source, Table) else source for source in sources]


def parse_weights(text: str, count: int, what: str = "sources") -> list[float]:
    """Parse a weight for each of several, joined by ``::`` as in open_clip's ``--train-data-upsampling-factors``."""
    try:
        weights = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(f"the weights {text!r} must be numbers joined by ::, like 1::2") from None
    if len(weights) != count:
        raise UserError(f"there are {len(weights)} weights, {text!r}, for {count} {what}: give one for each")
    return weights


def expand(pattern: str) -> list[str]:
    """Return the tar files that a pattern names, as absolute paths or URLs in the pattern's order.

    A path that exists names itself, whatever characters it contains; a folder, its files that end in .tar. Wildcards
    name the files that exist, sorted.
    """
    if not pattern:
        raise UserError("a source has no name: remove the :: next to it")
    if not is_remote(pattern) and not pattern.startswith(PIPE) and os.path.exists(pattern):
        return _shards_in(pattern) if os.path.isdir(pattern) else [os.path.abspath(pattern)]
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


def is_pattern(path: str) -> bool:
    """Whether a table's path stands for several: it has braces or wildcards, and does not exist."""
    return not os.path.exists(path) and (glob.has_magic(path) or "{" in path)


def table_paths(table: Table) -> list[str]:
    """Return the absolute paths of a table, or of those that its pattern names."""
    if is_remote(table.path):
        raise UserError(
            f"the table {table.path} is remote: copy it to this machine, and its images with it, or write both to "
            "webdataset's shards"
        )
    return expand(table.path) if is_pattern(table.path) else [os.path.abspath(table.path)]


def _shards_in(folder: str) -> list[str]:
    """Return the tar files of a folder; if there is none, refuse it with a hint at what it has instead."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # ._ files are macOS's
    if shards := [name for name in names if name.endswith(".tar")]:
        return [os.path.abspath(os.path.join(folder, name)) for name in shards]
    found = Counter(os.path.splitext(name)[1].lower() for name in names)
    own = folder.rstrip("/")
    if tables := [name for name in names if name.lower().endswith(_TABLES)]:
        hint = f"name a table, like {own}/{tables[0]}"
    elif any(found[f".{kind}"] for kind in ("gz", "tgz", "zst", "xz", "bz2")):
        hint = "decompress its files: samples are read by their offsets"
    elif within := next((name for name in names if glob.glob(f"{glob.escape(f'{own}/{name}')}/*.tar")), None):
        hint = f"name folders in it, like {own}/{within}, or all shards, like '{own}/*/*.tar'"
    elif any(found[kind] for kind in _IMAGES):
        hint = f"put images with their captions beside them into shards, like tar --sort=name -cf 0.tar -C {own} ."
    else:
        hint = "shards are tar files of images and captions, as img2dataset --output_format webdataset writes"
    raise UserError(f"the folder {folder} has no file that ends in .tar: {hint}")


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
        if name.endswith("/"):
            name += "*.tar"
        if "*" not in name:
            return [name]
        return matching(name)
    if os.path.exists(name) or not glob.has_magic(name):
        return [os.path.abspath(name)]
    return sorted(os.path.abspath(path) for path in glob.glob(name, recursive=True))


def table_rows(table: Table) -> Iterator[tuple[str, list[Caption]]]:
    """Yield image path and captions of every row as they are written; "" and None if a row lacks them."""
    return _parquet_rows(table) if table.path.lower().endswith(".parquet") else _text_rows(table)


def _text_rows(table: Table) -> Iterator[tuple[str, list[Caption]]]:
    line = 1
    csv.field_size_limit(_LONGEST_FIELD)
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
                    if any(map(str.strip, row[len(names) :])) and row != [_END]:
                        raise UserError(
                            f"line {start} of the table {table.path} has {len(row)} fields, its header {len(names)}: "
                            f"put quotes around captions with {separator!r} in them"
                        )
                    image, *captions = (row[place] if place < len(row) else None for place in places)
                    yield image or "", list[Caption](captions)
                row, start, line = following, line, reader.line_num + 2
            if row != [_END]:
                line = start
                raise csv.Error("a quote is not closed")
    except csv.Error as error:
        raise UserError(f"the table {table.path} breaks off at line {line} ({error}): correct it") from error
    except OSError as error:
        raise UserError(f"cannot read the table {table.path} ({error.strerror})") from error


def _parquet_rows(table: Table) -> Iterator[tuple[str, list[Caption]]]:
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
            for name in wanted:
                _check_column(table, name, file.schema_arrow.field(name).type, pyarrow.types)
            for batch in file.iter_batches(columns=wanted):
                columns = [batch[name].to_pylist() for name in wanted]
                for image, *captions in zip_longest(*columns):
                    yield _image_path(table, image), [_caption(each) for each in captions]
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the table {table.path} ({reason}): make it again") from error


def _check_column(table: Table, name: str, kind: Any, types: Any) -> None:
    """Refuse a column that holds neither text nor, for captions, lists of text."""
    own = kind
    if name != table.image and (types.is_list(own) or types.is_large_list(own) or types.is_fixed_size_list(own)):
        own = own.value_type
    if types.is_dictionary(own):
        own = own.value_type
    text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    if not any(is_of_kind(own) for is_of_kind in text):
        what = "paths of images" if name == table.image else "captions: text, or lists of text"
        raise UserError(
            f"the column {name} of {table.path} holds {str(kind)[:80]}, and not {what}: name another one, or write "
            "images and captions to webdataset's shards"
        )


def _image_path(table: Table, value: str | bytes | None) -> str:
    path = _text(value) or ""
    if len(path) > _LONGEST_PATH or "\0" in path:
        raise UserError(
            f"the column {table.image} of {table.path} holds images, and not their paths: write images and captions to "
            "webdataset's shards, as img2dataset --output_format webdataset does"
        )
    return path


def _caption(value: Any) -> Caption:
    return [_text(each) for each in value if each is not None] if isinstance(value, list) else _text(value)


def _text(value: Any) -> Any:
    # Parquet has text as bytes too; captions that are not UTF-8 are reported when they are decoded.
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _no_columns(table: Table, header: str) -> UserError:
    wanted = ", ".join((table.image, *table.captions))
    return UserError(
        f"the table {table.path} must have the columns {wanted}, its header is {header[:200]!r}: name its own by "
        "--image-key, --caption-key and --separator"
    )
