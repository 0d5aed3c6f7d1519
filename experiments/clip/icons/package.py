"""The icons of npm's ``@iconify/json``: fetched once, read as data, with the licence of each set."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, printable
from ..io.files import sync, write_atomically

PACKAGE, VERSION = "@iconify/json", "2.2.535"
#: SPDX names of the licences whose icons may be drawn, changed and passed on under any terms, where their authors are
#: named. Share-alike, non-commercial and GPL-like ones are left out.
LICENSES = frozenset(
    ("Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "MPL-2.0", "OFL-1.1", "Unlicense")
)
_MOST_BYTES = 1 << 28  # of one file of the package
_PIECE = 1 << 20
_MEMBERS = r"package/(?:package|collections|json/[\w-]+)\.json"
# Takes 1.5 % less than the preset does of 64 MB at a time, and 256 MB to read.
_FOR_TEXT = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 28, "lc": 4, "lp": 0, "pb": 0}]
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)  # what JSON of another form leads to
_DAMAGED = (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_OF_A_SET = ("name", "total", "author", "license", "category")
_SIZES = ("left", "top", "width", "height")


class Icon(NamedTuple):
    """One drawing: ``svg`` is a whole document, ``categories`` are the set's own names of what it shows."""

    name: str
    svg: str
    categories: tuple[str, ...]


class IconSet(NamedTuple):
    """The visible icons of one set; ``category`` is the package's own word for its kind."""

    prefix: str
    title: str
    author: str
    license: str
    url: str
    category: str
    icons: tuple[Icon, ...]


def fetch(folder: Path, source: Path | None = None) -> Path:
    """Return the package's archive: ``source``, or the one in ``folder``, whole or packed, else as npm fetches it.

    Raises
    ------
    UserError
        Without npm or a network, or if the file is not there.
    """
    if source is not None:
        if not source.is_file():
            raise UserError(f"--source {source} is not a file: give the archive that `npm pack {PACKAGE}` writes")
        return source
    path, packed = (folder / f"iconify-json-{VERSION}{ending}" for ending in (".tgz", ".tar.xz"))
    for found in (path, packed):
        if found.is_file():
            return found
    remedy = f"run `npm pack {PACKAGE}@{VERSION}` where there is a network, and give its file as --source"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm is not installed: {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(f"npm could not fetch the icons ({printable(said[-1]) if said else 'no output'}): {remedy}")
        sync(found[0])
        found[0].rename(path)
    return path


def read_package(path: Path) -> tuple[str, list[IconSet], dict[str, int]]:
    """Return the package's version, its sets whose licence is in `LICENSES`, and how many icons the others have.

    Raises
    ------
    UserError
        If the file is not the archive of such a package.
    """
    refused: dict[str, int] = {}
    members = read_members(path, _MEMBERS, PACKAGE)
    try:
        version = str(members["package/package.json"]["version"])
        sets = []
        for prefix, about in sorted(members["package/collections.json"].items()):
            license = str(about.get("license", {}).get("spdx") or "none")
            if license in LICENSES:
                sets.append(_icon_set(prefix, license, about, members[f"package/json/{prefix}.json"]))
            else:
                refused[license] = refused.get(license, 0) + int(about["total"])
    except _MALFORMED as error:
        raise _another(path, PACKAGE, error) from error
    return version, sets, refused


def write_packed(path: Path, archive: Path, is_drawn: Callable[[str, str], bool]) -> None:
    """Write an archive of what `read_package` reads, without the drawings of icons that ``is_drawn`` denies.

    It is asked for the prefix of a set and the name of an icon. Equal archives give equal files.

    Raises
    ------
    UserError
        If ``archive`` is not the archive of such a package.
    """
    members = read_members(archive, _MEMBERS, PACKAGE)
    try:
        kept = {name: members[f"package/{name}.json"] for name in ("package", "collections")}
        kept["collections"] = {
            prefix: {key: about[key] for key in _OF_A_SET if key in about}
            for prefix, about in kept["collections"].items()
        }
        for prefix, about in sorted(kept["collections"].items()):
            if about.get("license", {}).get("spdx") in LICENSES:
                kept[f"json/{prefix}"] = _packed(members[f"package/json/{prefix}.json"], partial(is_drawn, prefix))
    except _MALFORMED as error:
        raise _another(archive, PACKAGE, error) from error
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as packed:
        for name, content in kept.items():
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text))
    write_atomically(path, lzma.compress(data.getbuffer(), format=lzma.FORMAT_XZ, filters=_FOR_TEXT))


def _packed(content: Mapping[str, Any], is_drawn: Callable[[str], bool]) -> dict[str, Any]:
    """Return what is read of a set's file."""
    kept = {key: content[key] for key in _SIZES if key in content}
    kept["categories"] = {
        category: [name for name in names if is_drawn(name)]
        for category, names in content.get("categories", {}).items()
    }
    kept["icons"] = {
        name: {key: icon[key] for key in _SIZES if key in icon} | {"body": icon["body"] if is_drawn(name) else ""}
        for name, icon in content["icons"].items()
        if not icon.get("hidden")
    }
    return kept


def read_members(path: Path, wanted: str, package: str) -> dict[str, Any]:
    """Return the JSON files of an npm archive whose names match the pattern ``wanted``; nothing is unpacked.

    Raises
    ------
    UserError
        If the file cannot be read, or is not the archive of ``package``.
    """
    try:
        return dict(_members(path, wanted))
    except (*_MALFORMED, RecursionError, *_DAMAGED) as error:
        raise _another(path, package, error) from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): fetch it again") from error


def _another(path: Path, package: str, error: Exception) -> UserError:
    return UserError(f"{path} is not the archive of {package} ({printable(repr(error))}): fetch it again")


def _members(path: Path, wanted: str) -> Iterator[tuple[str, Any]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(wanted, member.name):
                if member.size > _MOST_BYTES:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, json.loads(file.read())
        # The checksum of what is compressed comes last, after the end of what it holds.
        assert archive.fileobj is not None
        while archive.fileobj.read(_PIECE):
            pass


def _icon_set(prefix: str, license: str, about: Mapping[str, Any], content: Mapping[str, Any]) -> IconSet:
    categories: dict[str, list[str]] = {}
    for category, names in content.get("categories", {}).items():
        for name in names:
            categories.setdefault(name, []).append(category)
    icons = tuple(
        Icon(name, _document(icon, content), tuple(categories.get(name, ())))
        for name, icon in sorted(content["icons"].items())
        if not icon.get("hidden")
    )
    author, url = about.get("author", {}), about.get("license", {}).get("url", "")
    return IconSet(
        prefix,
        str(about["name"]),
        str(author.get("name", "")),
        license,
        str(url),
        str(about.get("category", "")),
        icons,
    )


def _document(icon: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return a whole SVG document of an icon's body, its current color black; empty for an icon without a size."""
    left, top, width, height = (
        float(icon.get(key, content.get(key, otherwise))) for key, otherwise in zip(_SIZES, (0, 0, 16, 16), strict=True)
    )
    if not (0 < width < math.inf and 0 < height < math.inf):
        return ""
    box = f"{left:g} {top:g} {width:g} {height:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" color="#000">{icon["body"]}</svg>'
