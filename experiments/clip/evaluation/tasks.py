"""Zero-shot tasks in CLIP_benchmark's folder layout: a model's scores by its metrics.

A task is a folder that ``clip_benchmark eval --dataset wds/NAME --dataset_root FOLDER --no_amp`` reads as well, with
``--task zeroshot_retrieval`` for captions, and no more ``--num_workers`` than there are shards::

    dataset_type.txt                         retrieval or multilabel; absent for classification
    classnames.txt                           one class per line (not for retrieval)
    zeroshot_classification_templates.txt    one prompt per line, with {c} where the class goes (not for retrieval)
    test/nshards.txt                         how many shards there are
    test/0.tar ...                           an image, and .cls (classification), .npy (multilabel) or .txt (captions)

Where two items score the same, the one that comes first is ahead, as argmax has it: CLIP_benchmark's list of ImageNet
has two pairs of classes of one name.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.clip.data.reader import MAX_PIXELS
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation.metrics import RECALL_AT, Rows
from experiments.clip.io.tar import Damaged, tar_members
from experiments.clip.models.clip import Clip

Kind = Literal["classification", "multilabel", "retrieval"]
Progress = Callable[[int, int], None]

# In the order in which CLIP_benchmark looks for them.
_IMAGES = ("webp", "png", "jpg", "jpeg")
LABELS: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
TYPE_FILE, CLASSES_FILE, TEMPLATES_FILE = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"
_MAX_IMAGE, _MAX_LABEL = 2**28, 2**20  # bytes
# As webdataset splits a member's name: the type is what follows the first dot of the last part.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_QUERIES, _ITEMS = 1024, 2048  # a tile of scores, which stays in a cache
_AGAIN = "copy the task again"


class TaskScores(NamedTuple):
    """The scores of one task; ``task`` and the keys of ``metrics`` are CLIP_benchmark's.

    A metric that is not defined is left out: acc5 of fewer than 5 classes, R@k among fewer than k items.
    """

    name: str
    task: str
    samples: int
    metrics: dict[str, float]


def evaluate_task(
    clip: Clip,
    folder: Path,
    ranks: Ranks = ONE_PROCESS,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> TaskScores:
    """Score a model on one task, in evaluation mode; nothing is downloaded and no pickle is read.

    A class is the normalized mean of its prompts' normalized text features. Classification has ``acc1``, ``acc5`` and
    ``mean_per_class_recall`` over the classes with samples, and takes memory for one batch; multilabel has
    ``mean_average_precision``, and keeps the scores of all samples; retrieval has ``image_retrieval_recall@k`` (of the
    captions, those whose image is among the top k) and ``text_retrieval_recall@k`` (of the images, those with at least
    one of its captions among the top k), keeps all features, and compares them in tiles.

    Parameters
    ----------
    clip
        The model.
    folder
        The task. Its name is the task's.
    ranks
        Processes that share the work: each encodes every sample of some batches, all have all scores, the same to the
        last bit as one process. Every rank calls. Of an error, the rank that meets it says what it is, the others which
        rank that was.
    batch_size
        Images, or prompts, per call of the model.
    workers
        Processes that decode images; 0 decodes in this one.
    progress
        Called after each batch with how many of the samples are done, and how many there are.

    Raises
    ------
    UserError
        If a file of the task is missing, damaged, or at odds with another; if features are not finite.
    """
    task = ranks.run_on_all_or_fail(lambda: _open_task(Path(folder), batch_size))
    was_training = clip.model.training
    clip.model.eval()
    try:
        with torch.no_grad():
            batches = _encoded(clip, task, ranks, workers, progress)
            if task.kind == "retrieval":
                metrics = _retrieval(clip, task, ranks, batches)
            else:
                classifier = _classifier(clip, task, ranks, batch_size)
                score = _classification if task.kind == "classification" else _multilabel
                metrics = score(task, ranks, classifier, batches)
    finally:
        clip.model.train(was_training)
    name = "zeroshot_retrieval" if task.kind == "retrieval" else "zeroshot_classification"
    return TaskScores(task.folder.name, name, task.samples, metrics)


# --- the folder -----------------------------------------------------------------------------------------------


def task_scores(clip: Clip, tasks: Sequence[Path], ranks: Ranks = ONE_PROCESS) -> Iterator[tuple[str, float]]:
    """Yield the name, like ``TASK/acc1``, and the value of every metric of these tasks."""
    for folder in tasks:
        scores = evaluate_task(clip, folder, ranks)
        for metric, value in scores.metrics.items():
            yield f"{scores.name}/{metric}", value


class _Batch(NamedTuple):
    """Some samples that follow each other: rows ``first`` to ``first + count`` of the task, ``spans`` of one shard."""

    path: Path
    spans: np.ndarray  # [count, 4]: offset and size of the image, and of the label
    first: int


@dataclass(frozen=True)
class _Task:
    folder: Path
    kind: Kind
    classes: list[str]
    templates: list[str]
    batches: list[_Batch]
    samples: int


def _open_task(folder: Path, batch_size: int) -> _Task:
    """Read the small files, and the headers of the shards."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose at least 1")
    if not folder.is_dir():
        raise UserError(f"there is no task {folder}: name a folder with {CLASSES_FILE} and test/nshards.txt")
    kind: Any = _text(folder / TYPE_FILE).strip().lower() if (folder / TYPE_FILE).exists() else "classification"
    if kind not in LABELS:
        raise UserError(f"{folder / TYPE_FILE} says {kind!r}: only {', '.join(LABELS)} are known")
    classes = _lines(folder / CLASSES_FILE) if kind != "retrieval" else []
    templates = _lines(folder / TEMPLATES_FILE) if kind != "retrieval" else []
    for template in templates:
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise UserError(
                f"{folder / TEMPLATES_FILE} has the line {template!r}: mark the class by {{c}}, use no other brace"
            )
    batches: list[_Batch] = []
    samples = 0
    for path in _shard_paths(folder / "test"):
        spans = _spans(path, LABELS[kind])
        for start in range(0, len(spans), batch_size):
            batches.append(_Batch(path, spans[start : start + batch_size], samples + start))
        samples += len(spans)
    if not samples:
        raise UserError(f"the shards of {folder} hold no sample: {_AGAIN}")
    return _Task(folder, kind, classes, templates, batches, samples)


def _shard_paths(folder: Path) -> list[Path]:
    counted = _text(folder / "nshards.txt").strip()
    if not re.fullmatch("[1-9][0-9]{0,6}", counted):
        raise UserError(f"{folder / 'nshards.txt'} says {counted[:40]!r}: write how many shards there are")
    paths = [folder / f"{number}.tar" for number in range(int(counted))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, one of the {counted} shards that nshards.txt counts: {_AGAIN}")
    present = {path for path in folder.glob("*.tar") if path.stem.isdecimal()}
    if more := present - set(paths):
        raise UserError(f"{min(more)} is not among the {counted} shards that nshards.txt counts: correct the number")
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {_AGAIN}, or write it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({error}): {_AGAIN}") from error


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    if not all(lines) or not lines:
        line = f"line {lines.index('') + 1} of {path}" if lines else f"{path}"
        raise UserError(f"{line} is empty: {_AGAIN}, or delete the line")
    return lines


def _spans(path: Path, label: str) -> np.ndarray:  # [samples, 4]
    """Return where image and label of each sample are; members of a sample follow each other."""
    rows: list[tuple[int, ...]] = []
    try:
        with path.open("rb") as file:
            for key, members in itertools.groupby(_members(file, path), lambda member: member[0]):
                parts: dict[str, tuple[int, int]] = {}
                for _, suffix, offset, size in members:
                    if suffix in parts:
                        raise UserError(f"the sample {key} of {path} has two members .{suffix}: {_AGAIN}")
                    parts[suffix] = (offset, size)
                image = next((parts[suffix] for suffix in _IMAGES if suffix in parts), None)
                if image is None or label not in parts:
                    lacks = f".{label}" if image else ", ".join(f".{suffix}" for suffix in _IMAGES)
                    raise UserError(f"the sample {key} of {path} has no member {lacks}: {_AGAIN}")
                for (_, size), limit in ((image, _MAX_IMAGE), (parts[label], _MAX_LABEL)):
                    if size > limit:
                        raise UserError(f"the sample {key} of {path} has a member of {size} bytes: keep it <= {limit}")
                rows.append((*image, *parts[label]))
    except (OSError, Damaged) as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _members(file: Any, path: Path) -> Iterator[tuple[str, str, int, int]]:
    for member in tar_members(file, path.stat().st_size):
        match = _MEMBER.fullmatch(member.name)
        is_meta = "/" not in member.name and member.name.startswith("__") and member.name.endswith("__")
        if member.kind == "file" and match and not is_meta:
            yield match[1], match[2].lower(), member.offset, member.size


class _Decoded(NamedTuple):
    images: Tensor  # [b, 3, h, w]
    labels: list[Any]  # class, or [classes] of 0 and 1, or captions, each


class _Batches(Dataset):
    """Decoded batches by number; an error is a value, which worker processes hand over as it is."""

    def __init__(self, task: _Task, preprocess: Callable[[Any], Tensor]) -> None:
        self._task, self._preprocess = task, preprocess

    def __getitem__(self, number: int) -> _Decoded | UserError:
        path, spans, _ = self._task.batches[number]
        images: list[Tensor] = []
        labels: list[Any] = []
        offset = 0
        try:
            with path.open("rb") as file:
                for image, image_size, offset, size in spans.tolist():
                    labels.append(self._label(_bytes(file, offset, size)))
                    offset = image
                    images.append(self._preprocess(_image(_bytes(file, image, image_size))))
            return _Decoded(torch.stack(images), labels)
        # Pillow does not document what its decoders raise on damaged files.
        except Exception as error:
            return UserError(f"{_name(path, offset)} in {path} is of no use ({_reason(error)}): {_AGAIN}")

    def _label(self, data: bytes) -> Any:
        task = self._task
        if task.kind == "retrieval":
            captions = data.decode("utf-8").splitlines()
            if not captions:
                raise ValueError("no caption")
            return captions
        if task.kind == "multilabel":
            label = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if label.shape != (len(task.classes),) or not np.isin(label, (0, 1)).all():
                stated = f"{CLASSES_FILE} has {len(task.classes)} lines"
                raise ValueError(f"not 0 or 1 for each class, but an array of shape {label.shape}; {stated}")
            return label.astype(np.uint8)
        text = data.decode("ascii").strip()
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(task.classes):
            raise ValueError(f"class {text[:20]!r}; {CLASSES_FILE} has lines for 0 to {len(task.classes) - 1}")
        return int(text)


def _bytes(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    if len(data := file.read(size)) < size:
        raise ValueError("the file became shorter")
    return data


def _image(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
        return image.convert("RGB")


def _name(path: Path, offset: int) -> str:
    """Return the name of the member whose content is at ``offset``."""
    try:
        with path.open("rb") as file:
            members = tar_members(file, path.stat().st_size)
            return next((member.name for member in members if member.offset == offset), "a member")
    except (OSError, Damaged):
        return "a member"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- the work of several ranks ----------------------------------------------------------------------------------


class _Encoded(NamedTuple):
    """Unit features and labels of the rows from ``first`` on."""

    first: int
    images: Tensor  # [b, d]
    labels: list[Any]


def _encoded(clip: Clip, task: _Task, ranks: Ranks, workers: int, progress: Progress | None) -> Iterator[_Encoded]:
    """Yield this rank's batches, equally many on every rank: a model in parts needs all for each call.

    A rank that has no batch in the last round encodes a blank image and yields no row.
    """
    own = ranks.own_indices(len(task.batches))
    loader = iter(DataLoader(_Batches(task, clip.preprocess), batch_size=None, sampler=own, num_workers=workers))
    for turn in range(ranks.rounds(len(task.batches))):
        item = next(loader) if turn < len(own) else None
        ranks.raise_on_all(item if isinstance(item, UserError) else None)
        if item is None:
            blank = clip.preprocess(Image.new("RGB", (8, 8)))[None]
            _unit(clip.encode_image(blank), "image", ranks)
            yield _Encoded(0, torch.empty(0), [])
        elif isinstance(item, _Decoded):
            features = _unit(clip.encode_image(item.images), "image", ranks)
            yield _Encoded(task.batches[own[turn]].first, features, list(item.labels))
        if progress is not None:
            last = task.batches[min((turn + 1) * ranks.count, len(task.batches)) - 1]
            progress(last.first + len(last.spans), task.samples)


def _unit(features: Tensor, what: str, ranks: Ranks) -> Tensor:  # [b, d] -> [b, d]
    bad = int((~features.isfinite()).any(dim=1).sum())
    problem = (
        f"the model gives {bad} of {len(features)} {what} features that are not finite: take an earlier checkpoint"
    )
    ranks.raise_on_all(UserError(problem) if bad else None)
    return F.normalize(features.float(), dim=-1)


# --- the metrics ------------------------------------------------------------------------------------------------


def _classifier(clip: Clip, task: _Task, ranks: Ranks, batch_size: int) -> Tensor:  # [c, d]
    """Return the unit vector of each class; classes of one name have the same to the last bit."""
    names = list(dict.fromkeys(task.classes))
    per_call = max(1, batch_size // len(task.templates))
    chunks = [names[start : start + per_call] for start in range(0, len(names), per_call)]
    own = ranks.own_indices(len(chunks))
    vectors = torch.empty(0)
    for turn in range(ranks.rounds(len(chunks))):
        chunk = chunks[own[turn]] if turn < len(own) else chunks[-1]
        prompts = [template.replace("{c}", name) for name in chunk for template in task.templates]
        features = _unit(clip.encode_text(prompts), "text", ranks).unflatten(0, (len(chunk), len(task.templates)))
        if not vectors.numel():
            vectors = torch.zeros(len(names), features.shape[-1], device=clip.device)
        if turn < len(own):
            start = own[turn] * per_call
            vectors[start : start + len(chunk)] = F.normalize(features.mean(dim=1), dim=-1)
    ranks.sum(vectors)
    position = {name: number for number, name in enumerate(names)}
    return vectors[[position[name] for name in task.classes]]


def _classification(task: _Task, ranks: Ranks, classifier: Tensor, batches: Iterable[_Encoded]) -> dict[str, float]:
    classes = len(classifier)
    numbers = torch.arange(classes, device=classifier.device)
    # Of each class: its samples, those whose class is first, those whose class is among the first 5.
    counts = torch.zeros(3, classes, dtype=torch.int64, device=classifier.device)
    for batch in batches:
        if batch.labels:
            labels = torch.tensor(batch.labels, device=classifier.device)
            ahead = wrong_items_ahead(batch.images, classifier, labels, numbers)
            for row, chosen in enumerate((labels, labels[ahead < 1], labels[ahead < 5])):
                counts[row] += chosen.bincount(minlength=classes)
    samples, first, first_five = ranks.sum(counts).cpu().double()
    present = samples > 0
    metrics = {"acc1": (first.sum() / task.samples).item()}
    if classes >= 5:
        metrics["acc5"] = (first_five.sum() / task.samples).item()
    return metrics | {"mean_per_class_recall": (first[present] / samples[present]).mean().item()}


def _multilabel(task: _Task, ranks: Ranks, classifier: Tensor, batches: Iterable[_Encoded]) -> dict[str, float]:
    scores = torch.zeros(len(classifier), task.samples, device=classifier.device)
    labels = torch.zeros(scores.shape, dtype=torch.uint8, device=classifier.device)
    for first, images, own in batches:
        if own:
            rows = slice(first, first + len(own))
            scores[:, rows] = classifier @ images.T
            labels[:, rows] = torch.stack(own, dim=1).to(classifier.device)
    ranks.sum(scores)
    ranks.sum(labels)
    places = torch.arange(1, task.samples + 1, device=classifier.device)
    total = 0.0
    for some, truth in zip(scores, labels, strict=True):
        sorted_truth = truth[some.argsort(descending=True, stable=True)].double()
        total += (sorted_truth.cumsum(dim=0) / places * sorted_truth).sum().item() / max(int(truth.sum()), 1)
    return {"mean_average_precision": total / len(classifier)}


def _retrieval(clip: Clip, task: _Task, ranks: Ranks, batches: Iterable[_Encoded]) -> dict[str, float]:
    images = torch.empty(0)
    captions = torch.zeros(task.samples, dtype=torch.int64, device=clip.device)  # how many each image has
    own = Rows()  # this rank's captions
    is_own = torch.zeros(task.samples, dtype=torch.bool, device=clip.device)
    for first, features, labels in batches:
        flat = [caption for some in labels for caption in some]
        text = _unit(clip.encode_text(flat or [""]), "text", ranks)
        if not images.numel():
            images = torch.zeros(task.samples, text.shape[1], device=clip.device)
        if labels:
            rows = slice(first, first + len(labels))
            images[rows] = features
            captions[rows] = torch.tensor([len(some) for some in labels], device=clip.device)
            own.add(text)
            is_own[rows] = True
    ranks.sum(images)
    ranks.sum(captions)
    texts = torch.zeros(int(captions.sum()), images.shape[1], device=clip.device)
    places = is_own.repeat_interleave(captions).nonzero()[:, 0]
    for block in own.take():
        texts[places[: len(block)]] = block
        places = places[len(block) :]
    ranks.sum(texts)
    numbers = torch.arange(task.samples, device=clip.device)
    owners = numbers.repeat_interleave(captions)
    found = {
        "image": _recalls(texts, images, owners, numbers, ranks),
        "text": _recalls(images, texts, numbers, owners, ranks),
    }
    return {f"{side}_retrieval_recall@{k}": found[side][k] for k in RECALL_AT for side in found if k in found[side]}


def _recalls(
    queries: Tensor, items: Tensor, query_labels: Tensor, item_labels: Tensor, ranks: Ranks
) -> dict[int, float]:
    """Return R@k for each k that there are items for."""
    found = torch.zeros(len(RECALL_AT), dtype=torch.int64, device=queries.device)
    tiles = queries.split(_QUERIES)
    for number in ranks.own_indices(len(tiles)):
        labels = query_labels[number * _QUERIES : (number + 1) * _QUERIES]
        ahead = wrong_items_ahead(tiles[number], items, labels, item_labels)
        found += torch.stack([(ahead < k).sum() for k in RECALL_AT])
    shares = (ranks.sum(found).double() / len(queries)).tolist()
    return {k: share for k, share in zip(RECALL_AT, shares, strict=True) if k <= len(items)}


def wrong_items_ahead(
    queries: Tensor,  # [q, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [q]
    item_labels: Tensor,  # [m]
    tile: int = _ITEMS,
) -> Tensor:  # [q]
    """Count, for each query, the wrong items ahead of its first right one: of higher score, or of the same and before.

    Right are the items of the query's label. Takes memory for ``tile`` items; there is no ``[q, m]``.
    """
    best = queries.new_full((len(queries),), -torch.inf)
    place = torch.full((len(queries),), len(items), device=queries.device)
    ahead = torch.zeros_like(place)
    starts = range(0, len(items), tile)
    parts = list(zip(starts, items.split(tile), item_labels.split(tile), strict=True))
    low, high = query_labels.min(), query_labels.max()
    may_be_right = torch.stack([(labels.max() >= low) & (labels.min() <= high) for _, _, labels in parts]).tolist()
    for start, some, labels in itertools.compress(parts, may_be_right):
        score, position = (queries @ some.T).masked_fill_(query_labels[:, None] != labels, -torch.inf).max(dim=1)
        place = torch.where(score > best, position + start, place)
        best = best.maximum(score)
    # What is higher than the best right item, or the same and before the first such, is wrong: labels do not matter.
    at_least = best.nextafter(torch.full_like(best, -torch.inf))  # more than this
    for start, some, _ in parts:
        scores = queries @ some.T
        before = place - start  # items of this tile
        ahead += (scores > torch.where(before > 0, at_least, best)[:, None]).sum(dim=1, dtype=torch.int32)
        rows = ((before > 0) & (before < len(some))).nonzero()[:, 0]
        behind = torch.arange(len(some), device=queries.device) >= before[rows, None]
        ahead[rows] -= ((scores[rows] == best[rows, None]) & behind).sum(dim=1)
    return ahead


# --- the glyphs as tasks ----------------------------------------------------------------------------------------
