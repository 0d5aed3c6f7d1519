"""Pictures and names from elsewhere, to test a model of the icons on: emoji by CLDR's names, Tux Paint's stamps.

Both are read from packages that somebody else installs or fetches; nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import UserError, printable
from ..glyphs.tasks import Row, TaskText, png_of
from .package import read_members

EMOJI_PACKAGE, STAMPS_PACKAGE = "emojibase-data", "tuxpaint-stamps-default"
#: Where Debian's package puts the stamps.
STAMPS = Path("/usr/share/tuxpaint/stamps")
_LARGEST_SIDE = 224  # pixels of a stamp
_MOST_PIXELS = 1 << 24


class Named(NamedTuple):
    """A picture of an emoji, as the bytes of a PNG, and the words of its English name."""

    image: bytes
    name: str


def emoji_names(archive: Path, language: str) -> dict[str, str]:
    """Return CLDR's names of the emoji in one language, by their code points in hexadecimal.

    Parameters
    ----------
    archive : Path
        What ``npm pack emojibase-data`` writes.
    language : str
        One of the package's folders, like en or zh-hant.

    Raises
    ------
    UserError
        If the file is not the archive of that package, or has no such language.
    """
    if not archive.is_file():
        raise UserError(f"--emoji {archive} is not a file: give the archive that `npm pack {EMOJI_PACKAGE}` writes")
    members = read_members(archive, r"package/[\w-]+/data\.json", EMOJI_PACKAGE)
    known = {name.split("/")[1]: content for name, content in members.items()}
    if language not in known:
        languages = ", ".join(sorted(known)) or "none"
        raise UserError(f"{archive} has no emoji names in {printable(language[:40])!r}: choose among {languages}")
    try:
        # What has no group is a part of other emoji, like a regional indicator.
        return {str(entry["hexcode"]): str(entry["label"]) for entry in known[language] if "group" in entry}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{archive} is not the archive of {EMOJI_PACKAGE} ({printable(repr(error))})") from error


def emoji_task(pictures: Sequence[Named], english: dict[str, str], names: dict[str, str], language: str) -> TaskText:
    """Return the task to name pictures of emoji, over CLDR's names of all emoji in one language.

    A picture is of the emoji whose English name by CLDR, or name by Unicode, has the letters of the icon's name; where
    there is none, or no name in the language, it is left out.
    """
    codes = emoji_codes(
        [picture.name for picture in pictures], {code: english[code] for code in english if code in names}
    )
    classes = list(dict.fromkeys(names.values()))
    position = {label: number for number, label in enumerate(classes)}
    rows = [
        Row(picture.image, str(position[names[code]]))
        for picture, code in zip(pictures, codes, strict=True)
        if code is not None
    ]
    return TaskText(f"emoji-{language}", "classification", classes, ("{c}",), rows)


def emoji_codes(found: Sequence[str], english: dict[str, str]) -> list[str | None]:
    """Return the code points of the emoji that CLDR or Unicode call by each of some icons' names; None for others."""
    codes = {_letters(_unicode_name(code)): code for code in english}
    codes |= {_letters(label): code for code, label in english.items()}
    return [codes.get(_letters(name)) for name in found]


def _unicode_name(code: str) -> str:
    """Return Unicode's name of an emoji that is one character; empty if it is more, or has none."""
    first, *others = [part for part in code.split("-") if part != "FE0F"]
    return "" if others else unicodedata.name(chr(int(first, 16)), "")


def _letters(name: str) -> str:
    """Return the letters and digits of a name, without case and spaces, which some sets leave out."""
    return "".join(re.findall(r"\w+", name.casefold()))


def stamps_digest(folder: Path) -> str:
    """Return a digest of the names and sizes of the stamps in a folder; empty if there are none."""
    lines = [f"{path.relative_to(folder)} {path.stat().st_size}" for pair in _stamps(folder) for path in pair]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def stamps_task(folder: Path, language: str) -> TaskText | None:
    """Return the task to choose the sentence of each stamp among those of all; None if none has one in the language.

    Pictures are PNG on white, their longer side at most 224 pixels; stamps that are SVG are left out.
    """
    found = [(picture, sentence) for picture, text in _stamps(folder) if (sentence := _sentence(text, language))]
    if not found:
        return None
    classes = list(dict.fromkeys(sentence for _, sentence in found))
    position = {sentence: number for number, sentence in enumerate(classes)}
    rows = [Row(_on_white(picture), str(position[sentence])) for picture, sentence in found]
    return TaskText(f"stamps-{language}", "classification", classes, ("{c}",), rows)


def _stamps(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield picture and text of each stamp, in the order of their names."""
    for text in sorted(folder.rglob("*.txt")):
        picture = text.with_suffix(".png")
        if picture.is_file():
            yield picture, text


def _sentence(path: Path, language: str) -> str:
    """Return a stamp's sentence: English is the first line, another one begins with its language."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if language == "en":
        return lines[0].strip()
    mark = f"{language}.utf8="
    return next((line.removeprefix(mark).strip() for line in lines[1:] if line.startswith(mark)), "")


def _on_white(path: Path) -> bytes:
    try:
        with Image.open(path, formats=("PNG",)) as stored:
            if stored.width * stored.height > _MOST_PIXELS:
                raise ValueError(f"it has {stored.width} x {stored.height} pixels")
            picture = stored.convert("RGBA")
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the stamp {path} cannot be read ({error}): install {STAMPS_PACKAGE} again") from error
    white = Image.new("RGBA", picture.size, "white")
    return png_of(Image.alpha_composite(white, picture).convert("RGB"))
