"""Icons as pictures: what may be drawn, and PNG files that are equal on every machine."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import UserError
from ..io.files import write_atomically
from ..io.workers import spread

#: Part of what determines the pictures and captions: raised with each change of a rule in this folder.
RULE = 1
#: What would read files, load fonts or run programs, none of which an icon may: it is left out.
_UNSAFE = re.compile(
    r"<\s*(?:image|script|foreignObject|style|text|a)\b|\bhref\s*=\s*[\"']?\s*[^#\"'\s]|url\(\s*[\"']?\s*[^#\"'\s]|<!|<\?",
    re.IGNORECASE,
)
_MOST_BYTES = 100_000
_CHUNK = 1000  # icons that are drawn at a time, and kept in one file
_WHITE = 250  # of 255: a picture without a darker channel anywhere is empty to the eye


def _renderer() -> str:
    try:
        return f"resvg_py {version('resvg_py')}"
    except ModuleNotFoundError as error:
        raise UserError("icons are drawn by resvg_py, which is not installed: pip install 'drrho[icons]'") from error


def fault(svg: str) -> str:
    """Return why a document must not be drawn, or nothing."""
    if not svg or len(svg) > _MOST_BYTES:
        return "too long" if svg else "without a size"
    return "unsafe" if _UNSAFE.search(svg) else ""


def render(svg: str, pixels: int) -> bytes | None:
    """Return an icon on white as a PNG of RGB, ``pixels`` square, its longer side filling it; None if nothing is seen.

    None is also returned for a document that cannot be drawn.
    """
    import resvg_py

    try:
        drawn = resvg_py.svg_to_bytes(svg_string=_square(svg, pixels), skip_system_fonts=True, background="#ffffff")
    except ValueError:
        return None
    image = Image.open(io.BytesIO(bytes(drawn)), formats=("PNG",)).convert("RGB")
    if np.asarray(image).min() > _WHITE:
        return None
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _square(svg: str, pixels: int) -> str:
    return svg.replace("<svg ", f'<svg width="{pixels}" height="{pixels}" ', 1)


class Renders:
    """Pictures of documents, drawn by all cores and kept in a folder, so that an interrupted drawing goes on.

    A file holds the pictures of `_CHUNK` documents, under a name made of these, the size and the renderer's version.
    """

    def __init__(self, folder: Path, pixels: int) -> None:
        self._folder, self._pixels, self._made_by = folder, pixels, f"{_renderer()} {pixels}"

    def draw(self, documents: Sequence[str], progress: Callable[[int, int], None]) -> list[bytes | None]:
        """Return a PNG for each document, None for those that show nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        chunks = [documents[start : start + _CHUNK] for start in range(0, len(documents), _CHUNK)]
        pictures: list[bytes | None] = []
        for part in spread(self._chunk, chunks):
            pictures += part
            progress(len(pictures), len(documents))
        return pictures

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder)

    def _chunk(self, documents: Sequence[str]) -> list[bytes | None]:
        text = "\0".join([self._made_by, *documents]).encode()
        path = self._folder / f"{hashlib.sha256(text).hexdigest()[:32]}.safetensors"
        if path.exists() and (pictures := _load(path)) is not None:
            return pictures
        pictures = [render(document, self._pixels) for document in documents]
        write_atomically(path, _packed(pictures))
        return pictures


def _packed(pictures: Sequence[bytes | None]) -> bytes:
    data = b"".join(picture or b"" for picture in pictures)
    sizes = np.array([len(picture or b"") for picture in pictures], np.int64)
    digest = np.frombuffer(hashlib.sha256(sizes.tobytes() + data).digest(), np.uint8)
    return save({"data": np.frombuffer(data, np.uint8), "sizes": sizes, "digest": digest})


def _load(path: Path) -> list[bytes | None] | None:
    """Return what a file holds, or None if it is damaged and must be drawn again."""
    try:
        parts = load(path.read_bytes())
        data, sizes = parts["data"].tobytes(), parts["sizes"]
        if hashlib.sha256(sizes.tobytes() + data).digest() != parts["digest"].tobytes():
            return None
    except (SafetensorError, OSError, KeyError):
        return None
    ends = np.cumsum(sizes).tolist()
    return [data[end - size : end] or None for end, size in zip(ends, sizes.tolist(), strict=True)]
