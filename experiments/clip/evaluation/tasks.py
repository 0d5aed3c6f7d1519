"""A model's scores on zero-shot tasks by CLIP_benchmark's metrics and DataComp's, over any number of ranks.

Where two items score the same, the one that comes first is ahead, as argmax has it: CLIP_benchmark's list of ImageNet
has two pairs of classes of one name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .class_folders import holds_class_folders, open_class_folders
from .datacomp import (
    FACE_METRICS,
    entry_of,
    face_scores,
    group_scores,
    jaccard_names,
    jaccard_scores,
    macro_scores,
    missing_and_repeated,
    split_objectives,
)
from .encoding import Encoder, Progress, Rows
from .metrics import RECALL_AT, TILE, mean_average_precision, recalls, wrong_items_ahead
from .shards import TarShard
from .task_batches import DecodedBatch, TaskBatches
from .task_files import CLASSES_FILE, MARKER, TEMPLATES_FILE, Task, open_task

Scores = dict[str, float]


class TaskScores(NamedTuple):
    """The scores of one task; ``task`` and the keys of ``metrics`` are CLIP_benchmark's, or DataComp's.

    A metric that is not defined is left out: acc5 of fewer than 5 classes, R@k among fewer than k items. ``groups`` has
    accuracy and size of groups of samples, ``main`` is the metric that DataComp counts of the task.
    """

    name: str
    task: str
    samples: int
    metrics: Scores
    groups: Scores
    main: str | None


def open_tasks(paths: Sequence[Path]) -> list[Task]:
    """Open the tasks of some folders; the file that `run.py glyph-tasks` writes beside its tasks is passed over.

    Raises
    ------
    UserError
        If a path is no folder, if a file of a task is missing, damaged, or at odds with another, or if two tasks have
        one name.
    """
    tasks = [_open(path) for path in paths if not (path.name == MARKER and path.is_file())]
    if paths and not tasks:
        raise UserError(f"--tasks {paths[0]} names no folder: name the folders beside it")
    name, count = Counter(task.name for task in tasks).most_common(1)[0] if tasks else ("", 0)
    if count > 1:
        same = ", ".join(str(task.folder) for task in tasks if task.name == name)
        raise UserError(f"--tasks has {count} folders of one name ({same}): rename them, their scores would be one")
    return tasks


def _open(path: Path) -> Task:
    if not path.is_dir():
        raise UserError(
            f"--tasks {path} is no folder: name folders in CLIP_benchmark's layout, or with a folder of images for "
            "each class"
        )
    try:
        return open_class_folders(path) if holds_class_folders(path) else open_task(path)
    except OSError as error:
        raise UserError(f"--tasks {path} cannot be read ({error.strerror}): copy it again") from error


def evaluate_task(encoder: Encoder, task: Task, progress: Progress | None = None) -> TaskScores:
    """Score a model on one task, in evaluation mode (collective).

    Each rank encodes some batches, and all return the scores that one process returns, to the last bit. A class vector
    is the normalized mean of the normalized text features of its prompts. The metrics, and the memory that they take
    beside one batch's, depend on the kind of task:

    - classification: ``acc1``, ``acc5`` and ``mean_per_class_recall`` over the classes with samples, with memory for
      the place of each sample's class;
    - multilabel: ``mean_average_precision``, with memory for the scores of all samples;
    - retrieval: ``image_retrieval_recall@k``, the share of captions whose image is among the top k, and
      ``text_retrieval_recall@k``, the share of images with at least one of their captions among the top k, with memory
      for all features, which are compared in tiles;
    - association: the mean Jaccard index of the candidates that are associated with a cue and of as many that score
      highest.

    Raises
    ------
    UserError
        If a sample is damaged, or features are not finite. The rank that meets an error raises it; the others raise
        one that names that rank.
    """
    kind = _KINDS[task.kind]
    with encoder.evaluating():
        metrics, groups = kind.score(encoder, task, _encoded(encoder, task, progress))
    main = None if task.entry is None else task.entry.main
    return TaskScores(task.name, kind.name, task.samples, metrics, groups, main)


def metric_names(task: Task) -> list[str]:
    """Return the metrics that a task will have, without R@k for a k that not all tasks of its size have."""
    return _KINDS[task.kind].metrics(task)


def check_datacomp(tasks: Sequence[Task]) -> None:
    """Refuse tasks among which one of DataComp's is missing, is there twice, or has not its main metric."""
    for task in tasks:
        known = entry_of(task.folder)
        main = None if known is None else known.main
        if main is not None and (task.entry is None or main not in metric_names(task)):
            raise UserError(f"--datacomp: {task.folder} has not what {main} needs: copy the task again")
    missing, repeated = missing_and_repeated(task.entry for task in tasks if task.entry is not None)
    if missing:
        raise UserError(
            f"--datacomp needs all of DataComp's tasks, and --tasks has no folder of {', '.join(missing)}: name the "
            "missing ones, or leave out --datacomp"
        )
    if repeated:
        raise UserError(f"--tasks has {repeated[0]} twice, which has one part in DataComp's average: leave one out")


# --- the work of several ranks ----------------------------------------------------------------------------------


class _EncodedBatch(NamedTuple):
    """Unit features and labels of consecutive samples of the task; nothing where a rank has no batch in a round."""

    rows: slice
    images: Tensor  # [b, d]; of associations all candidates
    decoded: DecodedBatch | None


def _encoded(encoder: Encoder, task: Task, progress: Progress | None) -> Iterator[_EncodedBatch]:
    batches = TaskBatches(task, encoder.batch_size, encoder.clip.in_bytes(encoder.clip.preprocess))
    for number, batch in encoder.own_batches(batches, len(batches)):
        features = encoder.images(None if batch is None else batch.images)
        rows = slice(0, 0) if batch is None else slice(batch.first, batch.first + len(batch.labels))
        yield _EncodedBatch(rows, features, batch)
        if progress is not None:
            last = number - encoder.ranks.rank + encoder.ranks.count - 1
            progress(batches.end(last), task.samples)


def _class_vectors(encoder: Encoder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:  # [c, d]
    """Return the unit vector of each class; classes of one name have equal vectors, to the last bit."""
    ranks = encoder.ranks
    names = list(dict.fromkeys(classes))
    per_call = max(1, encoder.batch_size // len(templates))
    chunks = [names[start : start + per_call] for start in range(0, len(names), per_call)]
    own = ranks.own_indices(len(chunks))
    vectors = torch.empty(0)
    for turn in range(ranks.rounds(len(chunks))):
        chunk = chunks[own[turn]] if turn < len(own) else chunks[-1]
        prompts = [template.replace("{c}", name) for name in chunk for template in templates]
        features = encoder.texts(prompts).unflatten(0, (len(chunk), len(templates)))
        if not vectors.numel():
            vectors = features.new_zeros(len(names), features.shape[-1])
        if turn < len(own):
            start = own[turn] * per_call
            vectors[start : start + len(chunk)] = F.normalize(features.mean(dim=1), dim=-1)
    ranks.sum(vectors)
    position = {name: number for number, name in enumerate(names)}
    return vectors[[position[name] for name in classes]]


class _Collected:
    """Numbers about all samples of a task, of which each rank fills in some."""

    def __init__(self, encoder: Encoder, *shape: int) -> None:
        self._ranks = encoder.ranks
        self._values = torch.zeros(shape, dtype=torch.int64, device=encoder.clip.device)

    def fill(self, rows: slice, values: Tensor | np.ndarray) -> None:
        """Set some rows."""
        self._values[rows] = torch.as_tensor(values, device=self._values.device)

    def joined(self) -> np.ndarray:
        """Return all ranks' rows (collective)."""
        return self._ranks.sum(self._values).cpu().numpy()


# --- the metrics ------------------------------------------------------------------------------------------------


def _classification(encoder: Encoder, task: Task, batches: Iterable[_EncodedBatch]) -> tuple[Scores, Scores]:
    classifier = _class_vectors(encoder, task.classes, task.templates)
    numbers = torch.arange(len(classifier), device=classifier.device)
    entry = task.entry
    # Of each sample: its class, the wrong classes ahead of it, the one that scores highest.
    found = _Collected(encoder, task.samples, 3)
    about = _Collected(encoder, task.samples, entry.columns if entry else 0)
    for rows, images, batch in batches:
        if batch is None:
            continue
        labels = torch.tensor(batch.labels, device=classifier.device)
        ahead = wrong_items_ahead(images, classifier, labels, numbers, TILE)
        best = (images @ classifier.T).argmax(dim=1) if entry and entry.macro else ahead
        found.fill(rows, torch.stack([labels, ahead, best], dim=1))
        if batch.numbers is not None:
            about.fill(rows, batch.numbers)
    truth, ahead, best = found.joined().T
    metrics, groups = _accuracies(truth, ahead, len(task.classes)), {}
    if entry and entry.macro:
        metrics |= macro_scores(truth, best)
    if entry and entry.groups:
        columns = about.joined()
        for grouping in entry.groups:
            scores, by_group = group_scores(ahead < grouping.top, columns, grouping)
            metrics, groups = metrics | scores, groups | by_group
    return metrics, groups


def _accuracies(truth: np.ndarray, ahead: np.ndarray, classes: int) -> Scores:
    """Return CLIP_benchmark's metrics of each sample's class and the number of wrong classes ahead of it."""
    first = ahead < 1
    samples = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[first], minlength=classes)
    metrics = {"acc1": float(first.mean())}
    if classes >= 5:
        metrics["acc5"] = float((ahead < 5).mean())
    return metrics | {"mean_per_class_recall": float((right[samples > 0] / samples[samples > 0]).mean())}


def _classification_names(task: Task) -> list[str]:
    names = ["acc1", *(["acc5"] if len(task.classes) >= 5 else []), "mean_per_class_recall"]
    if task.entry is None:
        return names
    names += ["recall-macro_all", "F1-macro_all"] if task.entry.macro else []
    names += [name for each in task.entry.groups for name in (f"{each.metric}_avg", each.worst)]
    return list(dict.fromkeys(names))


def _objectives(encoder: Encoder, task: Task, batches: Iterable[_EncodedBatch]) -> tuple[Scores, Scores]:
    entry = task.entry
    assert entry is not None
    classes = split_objectives(task.classes, str(task.folder / CLASSES_FILE))
    templates = split_objectives(task.templates, str(task.folder / TEMPLATES_FILE))
    classifiers = [_class_vectors(encoder, *lines) for lines in zip(classes, templates, strict=True)]
    predicted = _Collected(encoder, task.samples, len(classifiers))
    about = _Collected(encoder, task.samples, entry.columns)
    for rows, images, batch in batches:
        if batch is not None and batch.numbers is not None:
            predicted.fill(rows, torch.stack([(images @ each.T).argmax(dim=1) for each in classifiers], dim=1))
            about.fill(rows, batch.numbers)
    return face_scores(predicted.joined(), about.joined())


def _multilabel(encoder: Encoder, task: Task, batches: Iterable[_EncodedBatch]) -> tuple[Scores, Scores]:
    classifier = _class_vectors(encoder, task.classes, task.templates)
    scores = torch.zeros(len(classifier), task.samples, device=classifier.device)
    labels = torch.zeros(scores.shape, dtype=torch.uint8, device=classifier.device)
    for rows, images, batch in batches:
        if batch is not None:
            scores[:, rows] = classifier @ images.T
            labels[:, rows] = torch.from_numpy(np.stack(batch.labels, axis=1)).to(classifier.device)
    encoder.ranks.sum(scores)
    encoder.ranks.sum(labels)
    return {"mean_average_precision": mean_average_precision(scores, labels)}, {}


def _retrieval(encoder: Encoder, task: Task, batches: Iterable[_EncodedBatch]) -> tuple[Scores, Scores]:
    ranks, device = encoder.ranks, encoder.clip.device
    images = torch.empty(0)
    captions = torch.zeros(task.samples, dtype=torch.int64, device=device)  # how many each image has
    own = Rows()  # this rank's captions
    is_own = torch.zeros(task.samples, dtype=torch.bool, device=device)
    for rows, features, batch in batches:
        text = encoder.texts([caption for some in batch.labels for caption in some] if batch is not None else [])
        if not images.numel():
            images = torch.zeros(task.samples, text.shape[1], device=device)
        if batch is not None:
            images[rows] = features
            captions[rows] = torch.tensor([len(some) for some in batch.labels], device=device)
            own.add(text)
            is_own[rows] = True
    ranks.sum(images)
    ranks.sum(captions)
    texts = torch.zeros(int(captions.sum()), images.shape[1], device=device)
    places = is_own.repeat_interleave(captions).nonzero()[:, 0]
    for block in own.take():
        texts[places[: len(block)]] = block
        places = places[len(block) :]
    ranks.sum(texts)
    numbers = torch.arange(task.samples, device=device)
    owners = numbers.repeat_interleave(captions)
    found = {
        "image": recalls(texts, images, owners, numbers, ranks),
        "text": recalls(images, texts, numbers, owners, ranks),
    }
    metrics = {f"{side}_retrieval_recall@{k}": found[side][k] for k in RECALL_AT for side in found if k in found[side]}
    if task.entry is not None:
        metrics["mean_recall@1"] = (found["image"][1] + found["text"][1]) / 2
    return metrics, {}


def _retrieval_names(task: Task) -> list[str]:
    names = [f"{side}_retrieval_recall@{k}" for k in RECALL_AT for side in ("image", "text") if k <= task.samples]
    return names + (["mean_recall@1"] if task.entry is not None else [])


def _association(encoder: Encoder, task: Task, batches: Iterable[_EncodedBatch]) -> tuple[Scores, Scores]:
    device = encoder.clip.device
    jaccard = torch.zeros(task.samples, dtype=torch.float64, device=device)
    for rows, images, batch in batches:
        labels = batch.labels if batch is not None else []
        cues = encoder.texts([_cue_prompt(label.cue) for label in labels])
        found, start = [], 0
        for cue, label in zip(cues, labels, strict=True):
            right = torch.from_numpy(label.is_right).to(device)
            scores = images[start : start + len(right)] @ cue
            chosen = scores.argsort(stable=True)[-int(label.is_right.sum()) :]
            hits = right[chosen].sum()
            found.append(hits.double() / (2 * right.sum() - hits))
            start += len(right)
        if found:
            jaccard[rows] = torch.stack(found)
    return jaccard_scores(encoder.ranks.sum(jaccard).cpu().numpy(), _candidates(task)), {}


def _cue_prompt(cue: str) -> str:
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def _candidates(task: Task) -> np.ndarray:  # [samples]
    return np.concatenate([shard.images() for shard in task.shards if isinstance(shard, TarShard)])


class _Kind(NamedTuple):
    """What CLIP_benchmark calls a kind of task, the metrics that it will have, and what computes them."""

    name: str
    metrics: Callable[[Task], list[str]]
    score: Callable[[Encoder, Task, Iterable[_EncodedBatch]], tuple[Scores, Scores]]


_KINDS = {
    "classification": _Kind("zeroshot_classification", _classification_names, _classification),
    "multilabel": _Kind("zeroshot_classification", lambda task: ["mean_average_precision"], _multilabel),
    "retrieval": _Kind("zeroshot_retrieval", _retrieval_names, _retrieval),
    "association": _Kind("association", lambda task: jaccard_names(_candidates(task)), _association),
    "objectives": _Kind("zeroshot_classification", lambda task: list(FACE_METRICS), _objectives),
}
