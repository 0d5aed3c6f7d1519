"""A folder with a folder of images for each class, such as ImageNet's validation set, opened as a task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from timm.data.imagenet_info import ImageNetInfo

from ..errors import UserError
from .shards import ClassFolder
from .task_files import (
    CLASSES_FILE,
    IMAGES,
    TEMPLATES_FILE,
    Task,
    class_names,
    opened,
    prompt_templates,
)

_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "jp2", "ppm", "pgm")


def holds_class_folders(folder: Path) -> bool:
    """Whether a folder has folders in it, and is not a task in CLIP_benchmark's layout."""
    test = folder / "test"
    is_task = (test / "nshards.txt").exists() or any(test.glob("*.tar"))
    return not is_task and not (folder / CLASSES_FILE).is_dir() and bool(_folders(folder))


def open_class_folders(folder: Path) -> Task:
    """List the images of each class; `UserError` is raised if there are none, or if names and folders do not agree."""
    folders = _folders(folder)
    names = [path.name for path in folders]
    if any((path / "test" / "nshards.txt").exists() for path in folders):
        raise UserError(f"{folder} holds tasks: name them, like {folder}/*")
    shards = [ClassFolder(path, _images(path, folder), label) for label, path in enumerate(folders)]
    if len(shards) < 2:
        raise UserError(f"{folder} has one folder, {names[0]}: a task has a folder for each of its classes")
    if (folder / CLASSES_FILE).exists():
        classes = class_names(folder / CLASSES_FILE)
        if len(classes) != len(names):
            raise UserError(
                f"{folder / CLASSES_FILE} has {len(classes)} lines for {len(names)} folders: write one for each, in "
                "the order of their names"
            )
    else:
        classes = _imagenet_names(names) or [name.replace("_", " ") for name in names]
    path = folder / TEMPLATES_FILE
    templates = prompt_templates(path) if path.exists() else [fill("{c}") for fill in OPENAI_IMAGENET_TEMPLATES]
    return opened(folder, "classification", classes, templates, shards, None)


def _folders(folder: Path) -> list[Path]:
    """Return the folders of classes by name; numbers by value."""
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    are_numbers = all(path.name.isdecimal() and path.name.isascii() for path in found)
    return sorted(found, key=lambda path: (int(path.name) if are_numbers else 0, path.name))


def _images(path: Path, folder: Path) -> tuple[str, ...]:
    """Return the images of a class, those in folders of its folder too, as torchvision's ImageFolder takes them."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for name in _files(path):
        suffix = PurePath(name).suffix.lower().removeprefix(".")
        if suffix in IMAGES or suffix in _OTHER_IMAGES:
            found[suffix in IMAGES].append(name)
    if found[False]:
        raise UserError(
            f"{path} holds {len(found[False])} images that are not JPEG, PNG or WebP, such as {found[False][0]}: "
            "convert them"
        )
    if not any(PurePath(name).parent == PurePath() for name in found[True]):
        raise UserError(
            f"{path} holds no JPEG, PNG or WebP image: {folder} is read as a folder with a folder of images for each "
            "class; name such a folder, or a task in CLIP_benchmark's layout"
        )
    return tuple(found[True])


def _files(path: Path) -> list[str]:
    """Return the files of a folder and of those in it, relative to it; what begins with a dot is passed over."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): copy it again") from error

    found: list[str] = []
    for place, folders, files in os.walk(path, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(place, name), path) for name in files if not name.startswith(".")]
    return sorted(found)


def _imagenet_names(names: Sequence[str]) -> list[str] | None:
    """Return open_clip's names of ImageNet's classes, if that is what the folders are named for."""
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if list(names) == [str(number) for number in range(len(synsets))]:
        return list(IMAGENET_CLASSNAMES)
    numbers = {synset: number for number, synset in enumerate(synsets)}
    if not all(name in numbers for name in names):
        return None
    return [IMAGENET_CLASSNAMES[numbers[name]] for name in names]
