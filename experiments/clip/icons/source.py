"""Icons with their names as a data set on disk: drawn once, split by drawing and by name."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.options import Data
from ..cli.terminal import console, progress_bar
from ..glyphs import source as glyphs
from ..glyphs.dataset import GlyphPair, Manifest, open_dataset, read_samples, write_dataset
from ..glyphs.drawing import swapped
from ..glyphs.tasks import png_of
from ..io.files import ensure_writable
from .captions import caption, style_of
from .options import Prepare
from .package import LICENSES, IconSet, fetch, read_package, write_packed
from .rendering import RULE, Renders, fault
from .splits import SHARES, drawing_splits, family_of, kind_of, split_of

#: Of the icons that `--size small` keeps, about 30,000 are left after the splits.
_SMALL_SHARE = 0.145
_SWAPPED_SEED = 0
_ATTRIBUTION, _LEFT_OUT = "ATTRIBUTION.md", "left_out.json"


class Candidate(NamedTuple):
    """An icon that has a place in a split, not yet drawn."""

    key: str
    svg: str
    caption: str
    split: str
    meta: dict[str, Any]


def run_prepare(options: Prepare) -> None:
    """Draw the pairs that the options name and write their shards, unless they are there."""
    if options.data.kind == "glyphs":
        glyphs.prepare(options.data)
    elif options.pack is not None:
        pack(options.pack, fetch(options.data.cache, options.source))
    else:
        prepare(options.data, options.source)


def dataset_folder(data: Data) -> Path:
    """Return where the icons are, or will be."""
    return data.cache / f"icons-{data.pixels}-{data.size}{f'-swapped-{data.swapped:g}' if data.swapped else ''}"


def dataset_settings(data: Data) -> dict[str, Any]:
    """Return what determines the pairs, beside the version of the package."""
    return {"kind": data.kind, "size": data.size, "pixels": data.pixels, "swapped": data.swapped, "rule": RULE}


def prepare(data: Data, archive: Path | None = None) -> Manifest:
    """Return the manifest of the icons, after drawing and writing them if they are not there.

    Their captions are the icons' names, a share ``data.swapped`` of the training split's exchanged. An interrupted
    drawing goes on where it was.
    """
    folder, pixels = dataset_folder(data), data.pixels
    if data.swapped:
        return _with_swapped_names(prepare(dataclasses.replace(data, swapped=0.0), archive), folder, data.swapped)
    if archive is None and (manifest := open_dataset(folder)) is not None:
        console.print(f"data       reusing {folder}")
        return manifest
    with console.status("reading the icons"):
        version, sets, refused = read_package(fetch(data.cache, archive))
        left_out = Counter({f"license {name}": count for name, count in refused.items()})
        candidates = list(_candidates(sets, data.size == "small", left_out))
    settings = {"package": version, "pixels": pixels, "size": data.size, "rule": RULE, "licenses": sorted(LICENSES)}
    if (manifest := open_dataset(folder, settings)) is not None:
        console.print(f"data       reusing {folder}")
        return manifest
    renders = Renders(data.cache / "icon-pictures", pixels)
    with progress_bar("drawing the icons") as advance:
        pictures = renders.draw([candidate.svg for candidate in candidates], advance)
    splits = _splits(candidates, pictures, left_out)
    vocabulary = sorted({pair.caption for pairs in splits.values() for pair in pairs})
    total = sum(len(pairs) for pairs in splits.values())
    extra = {_ATTRIBUTION: _attribution(sets, splits), _LEFT_OUT: json.dumps(left_out, indent=1).encode()}
    with progress_bar("writing shards") as advance:
        manifest = write_dataset(
            folder, splits, settings, vocabulary=vocabulary, extra=extra, progress=lambda done: advance(done, total)
        )
    renders.remove()
    sizes = ", ".join(f"{split.name} {split.samples}" for split in manifest.splits.values())
    console.print(f"data       wrote {total} icons to {folder} ({sizes})")
    console.print("left out   " + ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()))
    return manifest


def pack(path: Path, archive: Path) -> None:
    """Write an archive from which the same pairs are drawn: without the icons that have no place in a split."""
    ensure_writable(path.parent)
    with console.status(f"packing {path}, which takes minutes"):
        sets = read_package(archive)[1]
        kept = {(each.meta["set"], each.meta["icon"]) for each in _candidates(sets, False, Counter())}
        # Why one is left out is said by its drawing.
        kept |= {(icons.prefix, icon.name) for icons in sets for icon in icons.icons if fault(icon.svg)}
        write_packed(path, archive, lambda prefix, name: (prefix, name) in kept)
    console.print(f"data       wrote {path}, {path.stat().st_size / 1e6:.1f} MB, for --source")


def _with_swapped_names(natural: Manifest, folder: Path, share: float) -> Manifest:
    """Return the data set in which that share of the training icons have each other's names."""
    settings = {**natural.settings, "natural": natural.fingerprint, "swapped": share}
    if (manifest := open_dataset(folder, settings)) is not None:
        console.print(f"data       reusing {folder}")
        return manifest

    def stored(split: str) -> list[GlyphPair]:
        return [
            GlyphPair(pair.key, png_of(pair.image), pair.caption, pair.meta) for pair in read_samples(natural, split)
        ]

    with console.status("exchanging names"):
        splits = {split: stored(split) for split in natural.splits}
        names = swapped([pair.caption for pair in splits["train"]], share, _SWAPPED_SEED)
        splits["train"] = [pair._replace(caption=name) for pair, name in zip(splits["train"], names, strict=True)]
        extra = {name: (natural.folder / name).read_bytes() for name in (_ATTRIBUTION, _LEFT_OUT)}
        manifest = write_dataset(folder, splits, settings, vocabulary=natural.vocabulary, extra=extra)
    console.print(f"data       wrote {folder}, where {share:.0%} of the training icons have another's name")
    return manifest


def _candidates(sets: Sequence[IconSet], small: bool, left_out: Counter[str]) -> Iterator[Candidate]:
    by_drawing = drawing_splits(sets)
    for icons in sets:
        kind, family = kind_of(icons), family_of(icons)
        style = style_of([icon.name for icon in icons.icons])
        for icon in icons.icons:
            if small and _draw(f"{icons.prefix} {icon.name}") >= _SMALL_SHARE:
                continue
            words = caption(icon.name, style)
            split = split_of(kind, family, words, by_drawing) if words else None
            if reason := fault(icon.svg) or ("no name" if not words else "" if split else "drawing of the other pool"):
                left_out[reason] += 1
                continue
            assert split is not None
            meta: dict[str, Any] = {
                "name": words,
                "set": icons.prefix,
                "kind": kind,
                "license": icons.license,
                "icon": icon.name,
            }
            if icon.categories:
                meta["categories"] = list(icon.categories)
            yield Candidate(f"{icons.prefix}--{_key(icon.name)}", icon.svg, words, split, meta)


def _draw(text: str) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def _key(name: str) -> str:
    """Return a name that webdataset takes for a whole key: a long one ends in its hash."""
    return name if len(name) <= 48 else f"{name[:39]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _splits(
    candidates: Sequence[Candidate], pictures: Sequence[bytes | None], left_out: Counter[str]
) -> dict[str, list[GlyphPair]]:
    """Return the pairs of each split in a random order that depends on their keys alone.

    Of identical pictures one is kept, that of the first split of test, validation, reference and train.
    """
    order = {split: number for number, split in enumerate(SHARES)}
    drawn = sorted(
        zip(candidates, pictures, strict=True),
        key=lambda pair: (order[pair[0].split], hashlib.sha256(pair[0].key.encode()).digest()),
    )
    splits: dict[str, list[GlyphPair]] = {split: [] for split in reversed(SHARES)}
    seen: set[bytes] = set()
    for candidate, picture in drawn:
        digest = b"" if picture is None else hashlib.sha256(picture).digest()
        if picture is None or digest in seen:
            left_out["empty" if picture is None else "the same picture as another"] += 1
            continue
        seen.add(digest)
        splits[candidate.split].append(GlyphPair(candidate.key, picture, candidate.caption, candidate.meta))
    return splits


def _attribution(sets: Sequence[IconSet], splits: dict[str, list[GlyphPair]]) -> bytes:
    """Return a page that names the author and licence of every set of which an icon is there."""
    counts = Counter(pair.meta["set"] for pair in itertools.chain(*splits.values()))
    lines = ["# The icons, their authors and licenses", "", "| set | icons | author | license |", "|---|---|---|---|"]
    for icons in sets:
        if counts[icons.prefix]:
            license = f"[{icons.license}]({icons.url})" if icons.url else icons.license
            lines.append(f"| {icons.title} (`{icons.prefix}`) | {counts[icons.prefix]} | {icons.author} | {license} |")
    return ("\n".join(lines) + "\n").encode()
