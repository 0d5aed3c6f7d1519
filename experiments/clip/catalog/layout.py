"""Hints where shards are not laid out as webdataset wants: what members there are instead, and what to do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from ..errors import printable
from ..io.storage import open_seekable
from ..io.tar import Damaged, Member, tar_members

_IMAGES = ("jpg", "jpeg", "png", "webp")
_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "jp2", "ppm", "npy", "pyd", "pickle", "pkl")
_MEMBERS = 2000
_SHOWN = 5
_MAX_DESCRIPTION = 2**20


class _Seen(NamedTuple):
    """The first members of a shard: each one's key and type."""

    members: list[tuple[str, str, Member]]

    @property
    def types(self) -> Counter[str]:
        return Counter(kind for _, kind, _ in self.members)

    def keys(self, kinds: Sequence[str]) -> list[str]:
        return [key for key, kind, _ in self.members if kind in kinds]


def layout_hint(path: str, size: int, image_keys: Sequence[str], caption_keys: Sequence[str]) -> str:
    """Return what to do about a shard of which samples are left out; empty if nothing is known to help.

    ``image_keys`` and ``caption_keys`` are those of a catalog.
    """
    with open_seekable(path) as file:
        seen = _first_members(file, size)
        types = seen.types
        captions = ["json" if key.startswith("json:") else key for key in caption_keys]
        has_image, has_caption = (any(kind in types for kind in kinds) for kinds in (image_keys, captions))
        if not types:
            return ""
        if not has_image:
            return _about_images(types)
        if not has_caption:
            return _about_captions(file, seen)
    return _about_order(seen.keys(image_keys), seen.keys(captions))


def _first_members(file: Any, size: int) -> _Seen:
    found: list[tuple[str, str, Member]] = []
    try:
        for member in islice(tar_members(file, size), _MEMBERS):
            key, suffix = base_plus_ext(member.name)
            if member.kind == "file" and key and suffix and not PurePosixPath(member.name).name.startswith("."):
                found.append((key, suffix.lower(), member))
    except Damaged:
        pass
    return _Seen(found)


def _listed(types: Counter[str]) -> str:
    return ", ".join(f".{printable(kind[:40])} {count}" for kind, count in types.most_common(_SHOWN))


def _about_images(types: Counter[str]) -> str:
    own = [kind for kind in types if kind.rpartition(".")[2] in _IMAGES]
    if len(own) > 1 and all("." in kind for kind in types):
        first, second = (printable(kind[:40]) for kind in own[:2])
        return (
            f"the name of a sample ends at the first dot, and what follows is a type, here {first} and {second}: name "
            f"the members so that their only dot stands before {own[0].rpartition('.')[2]}"
        )
    if own:
        return f"its images may be --image-key {printable(own[0][:40])} (its first members: {_listed(types)})"
    if other := [kind for kind in types if kind.rpartition(".")[2] in _OTHER_IMAGES]:
        return f"images are JPEG, PNG or WebP, not {printable(other[0][:40])} (its first members: {_listed(types)})"
    return f"--image-key names the members that are images (its first members: {_listed(types)})"


def _about_captions(file: Any, seen: _Seen) -> str:
    types = seen.types
    for kind in ("txt", "caption", "text", "cap"):
        if kind in types:
            return f"its captions may be --caption-key {kind} (its first members: {_listed(types)})"
    if "json" in types:
        first = next(member for _, kind, member in seen.members if kind == "json")
        if fields := _text_fields(file, first):
            return (
                f"its captions may be --caption-key json:{printable(fields[0][:40])} (of the fields {_words(fields)})"
            )
    return f"--caption-key names the members that are captions (its first members: {_listed(types)})"


def _words(fields: Sequence[str]) -> str:
    return ", ".join(printable(each[:40]) for each in fields[:_SHOWN])


def _text_fields(file: Any, member: Member) -> list[str]:
    """Return the fields of a document that hold text or lists, those that are called caption or text first."""
    try:
        file.seek(member.offset)
        fields = json.loads(file.read(min(member.size, _MAX_DESCRIPTION)).decode("utf-8-sig")).items()
    except (ValueError, AttributeError, RecursionError):
        return []
    names = [name for name, value in fields if isinstance(value, str | list)]
    return sorted(names, key=lambda name: not any(word in name.lower() for word in ("caption", "text")))


def _about_order(images: Sequence[str], captions: Sequence[str]) -> str:
    """Return what to do where both images and captions are there, but not side by side."""
    if set(images) & set(captions):
        return "members of a sample must follow each other, as tar --sort=name -cf 0.tar -C FOLDER . writes them"
    alike = {PurePosixPath(key).name for key in images} & {PurePosixPath(key).name for key in captions}
    where = f"{printable(images[0][:80])} and {printable(captions[0][:80])} are two samples"
    if alike:
        return f"{where}: image and caption must be in one folder, under one name up to the first dot"
    return f"{where}: image and caption must have one name up to the first dot"
