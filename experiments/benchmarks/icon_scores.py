"""What a model knows of held-out icons: naming beside pixels, how far names go with pictures, zero-shot tasks.

``python -m experiments.benchmarks.icon_scores`` takes the prepared icons of ``--cache``, and writes
``experiments/clip/icons/results/scores.json`` and the tables of ``experiments/clip/icons/README.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.benchmarks.measure import provenance, table
from experiments.clip.cli.options import Data
from experiments.clip.errors import UserError
from experiments.clip.evaluation.encoding import Encoder, encode_images, encode_texts
from experiments.clip.evaluation.metrics import predictions
from experiments.clip.evaluation.tasks import evaluate_task, open_tasks
from experiments.clip.glyphs.dataset import Manifest, StoredPair, open_dataset, read_samples
from experiments.clip.icons.options import IconTasks
from experiments.clip.icons.source import dataset_folder
from experiments.clip.icons.tasks import run_icon_tasks
from experiments.clip.icons.transfer import emoji_codes, emoji_names
from experiments.clip.io.files import write_json
from experiments.clip.models.clip import Clip, load_model

ICONS = Path(__file__).parents[1] / "clip" / "icons"
RESULTS, README = ICONS / "results" / "scores.json", ICONS / "README.md"
BEGIN, END = "<!-- scores: written by experiments/benchmarks/icon_scores.py -->", "<!-- end of scores -->"
CLDR = "emoji, by CLDR's names"
KINDS = ("emoji", CLDR, "interface", "brand")
RESAMPLES = 2000
TOP = (1, 5, 10)
SIDES = {"16 x 16, color": (16, "RGB"), "32 x 32, gray": (32, "L")}
_NEIGHBORS, _BATCH = 300, 256


class Interval(NamedTuple):
    """An estimate with its percentile interval over resampled names, all icons of a name together."""

    value: float
    low: float
    high: float


def area(scores: np.ndarray, is_true: np.ndarray, weights: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a true pair scores above a swapped one, ties half.

    Parameters
    ----------
    scores, is_true, weights : ndarray ``[n]``
        Each pair's score, whether it is a true one, and how often it counts.
    """
    values, place = np.unique(scores, return_inverse=True)
    swapped = np.bincount(place, weights * ~is_true, len(values))
    below = np.cumsum(swapped) - swapped / 2
    true = weights * is_true
    return float((true * below[place]).sum() / (true.sum() * swapped.sum()))


def separation(own: np.ndarray, other: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> Interval:
    """Return the area between true pairs' scores ``own`` and swapped ones' ``other``, of icons with these ``names``."""
    _, cluster = np.unique(np.array(names), return_inverse=True)
    clusters = cluster.max() + 1
    scores, is_true = np.concatenate([own, other]), np.arange(2 * len(own)) < len(own)
    both = np.concatenate([cluster, cluster])
    found = []
    for _ in range(RESAMPLES):
        counts = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)
        found.append(area(scores, is_true, counts[both].astype(float)))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(area(scores, is_true, np.ones(len(scores))), float(low), float(high))


def exchanged(names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Return for each icon the place of another at random, whose name is another one."""
    place = rng.integers(len(names), size=len(names))
    own = np.array(names)
    while (same := own[place] == own).any():
        place[same] = rng.integers(len(names), size=int(same.sum()))
    return place


def separations(pairs: Sequence[StoredPair], images: Tensor, texts: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return, by kind, how far true names are told from those of other icons of the kind; ``texts`` are by icon."""
    rng = np.random.default_rng(seed)
    found = {}
    for kind in sorted({pair.meta["kind"] for pair in pairs} & set(KINDS), key=KINDS.index):
        rows = [number for number, pair in enumerate(pairs) if pair.meta["kind"] == kind]
        names = [pairs[number].caption for number in rows]
        if len(set(names)) < 2:
            continue
        image, text = images[rows], texts[rows]
        own = (image * text).sum(dim=1).numpy()
        other = (image * text[torch.from_numpy(exchanged(names, rng))]).sum(dim=1).numpy()
        found[kind] = {"icons": len(rows), "names": len(set(names)), **separation(own, other, names, rng)._asdict()}
    return found


def by_cldr(pairs: Sequence[StoredPair], english: dict[str, str]) -> tuple[list[StoredPair], list[int]]:
    """Return the emoji among the pairs that CLDR knows, named as there and of a kind of their own, and their places."""
    places = [number for number, pair in enumerate(pairs) if pair.meta["kind"] == "emoji"]
    codes = emoji_codes([pairs[number].caption for number in places], english)
    known = [(pairs[number], english[code], number) for number, code in zip(places, codes, strict=True) if code]
    renamed = [replace(pair, caption=label, meta={**pair.meta, "kind": CLDR}) for pair, label, _ in known]
    return renamed, [number for *_, number in known]


def top_shares(ranked: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, float]:
    """Return the share of icons whose name is among the first k of those that are ranked for it."""
    return {
        f"top{k}": sum(name in some[:k] for some, name in zip(ranked, names, strict=True)) / len(names) for k in TOP
    }


def nearest_names(
    queries: Tensor, items: Tensor, item_names: Sequence[str], allowed: frozenset[str]
) -> tuple[list[list[str]], Tensor]:  # queries [n, d], items [m, d]
    """Return for each query the distinct names, among those allowed, of the items at the smallest distance, and it."""
    usable = [number for number, name in enumerate(item_names) if name in allowed]
    items, own = items[usable], [item_names[number] for number in usable]
    lengths = items.square().sum(dim=1)
    ranked, distances = [], []
    for some in queries.split(_BATCH):
        nearest = (lengths - 2 * some @ items.T).topk(min(_NEIGHBORS, len(own)), largest=False)
        ranked += [list(dict.fromkeys(own[int(k)] for k in row))[: max(TOP)] for row in nearest.indices]
        distances.append((nearest.values[:, 0] + some.square().sum(dim=1)).clamp(min=0).sqrt())
    return ranked, torch.cat(distances)


def raw_pixels(images: Sequence[Image.Image], side: int, mode: str) -> Tensor:  # [n, side * side * channels]
    """Return pictures as numbers from 0 to 1."""
    small = [np.asarray(image.convert(mode).resize((side, side), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small).reshape(len(small), -1)).float() / 255


def by_pixels(manifest: Manifest, held_out: Sequence[StoredPair], allowed: frozenset[str]) -> dict[str, Any]:
    """Return the shares of the nearest neighbor among all icons of both pools, over raw pixels, at its better size.

    ``far`` has those of the half of the icons that is farthest from any icon of the pools, and ``far_icons`` which
    these are: a bit for each icon, in hexadecimal.
    """
    names: list[str] = []
    parts: dict[str, list[Tensor]] = {label: [] for label in SIDES}
    pool = itertools.chain(*(read_samples(manifest, split) for split in ("train", "reference")))
    while some := list(itertools.islice(pool, 4096)):
        names += [pair.caption for pair in some]
        for label, form in SIDES.items():
            parts[label].append(raw_pixels([pair.image for pair in some], *form))
    own, found = [pair.caption for pair in held_out], {}
    for label, form in SIDES.items():
        asked = raw_pixels([pair.image for pair in held_out], *form)
        found[label] = nearest_names(asked, torch.cat(parts[label]), names, allowed)
    best = max(found, key=lambda label: top_shares(found[label][0], own)["top1"])
    ranked, distances = found[best]
    is_far = (distances > distances.median()).numpy()
    far = {
        "icons": int(is_far.sum()),
        **top_shares(*([each[k] for k in np.flatnonzero(is_far)] for each in (ranked, own))),
    }
    bits = np.packbits(is_far).tobytes().hex()
    return {"pixels": best, "icons": len(held_out), **top_shares(ranked, own), "far": far, "far_icons": bits}


def measured_before(path: Path, fingerprint: str, asked: int) -> dict[str, Any] | None:
    """Return the shares of the neighbors that an earlier record has of the same icons: no model takes part in them."""
    try:
        record = json.loads(path.read_bytes())
        found = record["naming"]["neighbors"]
        bytes.fromhex(found["far_icons"])
        return found if (record["data"], found["icons"]) == (fingerprint, asked) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def names_of_model(
    images: Tensor, held_out: Sequence[StoredPair], names: Sequence[str], texts: Tensor
) -> dict[str, Any]:
    """Return the shares of a model over all names; a tie goes to the name that comes first."""
    _, best = predictions(images, texts, max(TOP))
    ranked = [[names[int(k)] for k in row] for row in best]
    return {"icons": len(held_out), "names": len(names), **top_shares(ranked, [pair.caption for pair in held_out])}


def scores(clip: Clip, data: Data, asked: int, tasks: IconTasks, earlier: Path) -> dict[str, Any]:
    """Return all figures; ``asked`` icons are those that the neighbors by pixels are found of."""
    manifest = open_dataset(dataset_folder(data))
    if manifest is None:
        raise UserError("there are no icons: run `python experiments/clip/run.py prepare --data icons`")
    held_out = list(read_samples(manifest, "test"))
    clip.model.eval()
    prepared = (
        torch.stack([clip.preprocess(pair.image) for pair in held_out[start : start + _BATCH]])
        for start in range(0, len(held_out), _BATCH)
    )
    images = encode_images(clip.encode_image, prepared)
    names = sorted({pair.caption for pair in held_out})
    texts = encode_texts(clip.encode_text, names)
    place = {name: number for number, name in enumerate(names)}
    by_icon = texts[[place[pair.caption] for pair in held_out]]
    found: dict[str, Any] = {"separation": separations(held_out, images, by_icon)}
    if tasks.emoji is not None:
        emoji, own = by_cldr(held_out, emoji_names(tasks.emoji, "en"))
        spoken = encode_texts(clip.encode_text, [pair.caption for pair in emoji])
        found["separation"] |= separations(emoji, images[own], spoken)
    some = held_out[:asked]
    near = measured_before(earlier, manifest.fingerprint, len(some)) or by_pixels(manifest, some, frozenset(names))
    far = np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(near["far_icons"]), np.uint8), count=len(some)))
    found["naming"] = {
        "all": names_of_model(images, held_out, names, texts),
        "asked": names_of_model(images[:asked], some, names, texts),
        "far": names_of_model(images[far], [some[k] for k in far], names, texts),
        "neighbors": near,
    }
    run_icon_tasks(tasks)
    folders = sorted(path for path in tasks.out.iterdir() if path.is_dir())
    encoder = Encoder(clip, batch_size=_BATCH)
    results = [evaluate_task(encoder, task) for task in open_tasks(folders)]
    found["tasks"] = {each.name: {"samples": each.samples, **each.metrics} for each in results}
    return {"data": manifest.fingerprint, "model": clip.fingerprint, **found}


def page(record: dict[str, Any]) -> str:
    """Return the tables of a record."""
    naming, tasks = record["naming"], record["tasks"]
    rows = [
        {"": name, "icons": own["icons"], **{f"top-{k}, %": f"{100 * own[f'top{k}']:.2f}" for k in TOP}}
        for name, own in (
            ("the model, all held-out icons", naming["all"]),
            ("the model, the first of these", naming["asked"]),
            (f"nearest neighbor over raw pixels ({naming['neighbors']['pixels']}), the same", naming["neighbors"]),
            ("the model, the half of the same whose nearest neighbor is farthest", naming["far"]),
            ("nearest neighbor over raw pixels, that half", naming["neighbors"]["far"]),
        )
    ]
    areas = [
        {"kind": kind, "icons": own["icons"], "names": own["names"]}
        | {"AUC": f"{own['value']:.3f}", "95 % interval": f"{own['low']:.3f} to {own['high']:.3f}"}
        for kind, own in record["separation"].items()
    ]
    zero_shot = [
        {"task": name, "samples": own["samples"]}
        | {"metrics": ", ".join(f"{key} {value:.4f}" for key, value in own.items() if key != "samples")}
        for name, own in tasks.items()
    ]
    about = f"Naming over all {naming['all']['names']} names of the test split:"
    heads = (about, "True pairs against swapped ones, names exchanged within a kind:", "Zero-shot tasks:")
    tables = (table(rows), table(areas), table(zero_shot))
    made = record["made"]
    lines = [f"`{made['command']}`, {made['date']}, torch {made['versions']['torch']}."]
    return "\n\n".join([*lines, *(f"{head}\n\n{body}" for head, body in zip(heads, tables, strict=True))])


def rewritten(text: str, tables: str) -> str:
    """Return the README with other tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the record and the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the prepared icons")
    parser.add_argument("--pixels", type=int, default=64, help="width of the icons' pictures")
    parser.add_argument("--model", default="icons", help="the model; by default the one that ships")
    parser.add_argument("--asked", type=int, default=2500, help="icons whose neighbors by pixels are looked for")
    parser.add_argument("--emoji", type=Path, help="what `npm pack emojibase-data` writes")
    parser.add_argument("--stamps", type=Path, help="folder of Tux Paint's stamps")
    parser.add_argument("--languages", nargs="+", default=["en", "de", "fr"], help="of emoji and stamps")
    parser.add_argument("--tasks", type=Path, default=Path("icon-tasks"), help="folder of the tasks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the record")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = Data(kind="icons", cache=given.cache, pixels=given.pixels)
    options = IconTasks(data, "test", given.emoji, given.stamps, tuple(given.languages), out=given.tasks)
    try:
        found = scores(load_model(given.model), data, given.asked, options, given.out)
    except UserError as error:
        print(f"icon_scores: error: {error}", file=sys.stderr)
        return 2
    command = "python -m experiments.benchmarks.icon_scores"
    command += " --emoji FILE" * (given.emoji is not None) + " --stamps FOLDER" * (given.stamps is not None)
    record = {"made": provenance(command, ("torch", "open_clip_torch"))} | found
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, json.loads(json.dumps(record, default=float)))
    tables = page(record)
    print(tables)
    if given.out == RESULTS:
        README.write_text(rewritten(README.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
