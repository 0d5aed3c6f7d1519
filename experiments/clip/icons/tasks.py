"""The held-out icons as zero-shot tasks in CLIP_benchmark's folder layout, with pictures from elsewhere beside them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..cli.terminal import console
from ..errors import UserError
from ..glyphs.dataset import StoredPair, read_samples
from ..glyphs.tasks import Row, TaskText, png_of, write_tasks
from .options import IconTasks
from .source import prepare
from .transfer import (
    EMOJI_PACKAGE,
    STAMPS,
    STAMPS_PACKAGE,
    Named,
    emoji_names,
    emoji_task,
    stamps_digest,
    stamps_task,
)

#: Icons that a category needs to be a class.
LEAST = 20


def run_icon_tasks(options: IconTasks) -> None:
    """Write the tasks of the held-out icons, and of what is installed beside them, and print their folders."""
    stamps = _stamps_folder(options.stamps)
    if options.emoji is None:
        console.print(f"left out   emoji by CLDR's names: run `npm pack {EMOJI_PACKAGE}` and give its file as --emoji")
    if stamps is None:
        console.print(f"left out   Tux Paint's stamps: run `apt-get install {STAMPS_PACKAGE}`")
    english = {} if options.emoji is None else emoji_names(options.emoji, "en")
    manifest = prepare(options.data)
    marker = {
        "format": 1,
        "data": manifest.fingerprint,
        "split": options.split,
        "languages": list(options.languages),
        "emoji": hashlib.sha256("\n".join(english.values()).encode()).hexdigest() if english else "",
        "stamps": "" if stamps is None else stamps_digest(stamps),
    }

    def tasks() -> Iterator[TaskText]:
        pairs = list(read_samples(manifest, options.split))
        yield from icon_tasks(pairs)
        emoji = [Named(png_of(pair.image), pair.caption) for pair in pairs if pair.meta["kind"] == "emoji"]
        for language in options.languages:
            if options.emoji is not None:
                names = english if language == "en" else emoji_names(options.emoji, language)
                yield from _with_rows(emoji_task(emoji, english, names, language))
            if stamps is not None:
                yield from _with_rows(stamps_task(stamps, language), f"Tux Paint's stamps in {language}")

    for folder in write_tasks(options.out, marker, tasks):
        console.print(f"task       {folder}")


def _stamps_folder(given: Path | None) -> Path | None:
    """Return where the stamps are: the folder that is named, which must have some, or Debian's if it is there."""
    folder = STAMPS if given is None else given
    if stamps_digest(folder):
        return folder
    if given is not None:
        raise UserError(f"--stamps {given} has no stamps: name the folder of {STAMPS_PACKAGE}, usually {STAMPS}")
    return None


def _with_rows(task: TaskText | None, name: str = "") -> Iterator[TaskText]:
    """Yield a task that has pictures; say where one has none."""
    if task is not None and task.rows:
        yield task
    else:
        console.print(f"left out   {name or (task.name if task else '')}: no picture has a name in it")


def icon_tasks(pairs: Sequence[StoredPair]) -> Iterator[TaskText]:
    """Yield the tasks of held-out icons.

    ``icon-names``: which of all distinct names of these icons each has. ``icon-retrieval``: the first icon of each
    name, and the names. ``icon-categories``: which category each has, of those icons to which their set gives one
    category that at least `LEAST` of these icons have.
    """
    images = [png_of(pair.image) for pair in pairs]
    names = sorted({pair.caption for pair in pairs})
    position = {name: number for number, name in enumerate(names)}
    rows = [Row(image, str(position[pair.caption])) for image, pair in zip(images, pairs, strict=True)]
    yield TaskText("icon-names", "classification", names, ("{c}",), rows)
    first: dict[str, bytes] = {}
    for image, pair in zip(images, pairs, strict=True):
        first.setdefault(pair.caption, image)
    yield TaskText("icon-retrieval", "retrieval", (), (), [Row(image, name) for name, image in first.items()])
    own = [_category(pair) for pair in pairs]
    counts = Counter(category for category in own if category)
    classes = sorted(category for category, count in counts.items() if count >= LEAST)
    if len(classes) > 1:
        numbers = {category: str(number) for number, category in enumerate(classes)}
        rows = [
            Row(image, numbers[category]) for image, category in zip(images, own, strict=True) if category in numbers
        ]
        yield TaskText("icon-categories", "classification", classes, ("{c}",), rows)


def _category(pair: StoredPair) -> str:
    """Return the one category that an icon's set gives it; empty if that is none or several."""
    categories = pair.meta.get("categories", ())
    return " ".join(categories[0].lower().split()) if len(categories) == 1 else ""
