"""A model's scores on zero-shot tasks in CLIP_benchmark's layout, by its metrics, over any number of ranks.

Where two items score the same, the one that comes first is ahead, as argmax has it: CLIP_benchmark's list of ImageNet
has two pairs of classes of one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation.encoding import Rows
from experiments.clip.evaluation.metrics import RECALL_AT, mean_average_precision, wrong_items_ahead
from experiments.clip.evaluation.task_files import BatchDecoder, DecodedBatch, Task, open_task
from experiments.clip.io.workers import Workers
from experiments.clip.models.clip import Clip

Progress = Callable[[int, int], None]

_QUERIES, _ITEMS = 1024, 2048  # a tile of scores, which stays in a cache


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

    A class vector is the normalized mean of the normalized text features of its prompts. The metrics and the memory
    that they take depend on the kind of task:

    - classification: ``acc1``, ``acc5`` and ``mean_per_class_recall`` over the classes with samples, with memory for
      one batch;
    - multilabel: ``mean_average_precision``, with memory for the scores of all samples;
    - retrieval: ``image_retrieval_recall@k``, the share of captions whose image is among the top k, and
      ``text_retrieval_recall@k``, the share of images with at least one of their captions among the top k, with memory
      for all features, which are compared in tiles.

    Parameters
    ----------
    clip
        The model.
    folder
        The task's folder; its name is the task's.
    ranks
        Processes that share the work; all of them must call. Each encodes some batches, and all return the scores that
        one process returns, to the last bit. The rank that meets an error raises it; the others raise one that names
        that rank.
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
    task = ranks.run_on_all_or_fail(lambda: open_task(Path(folder), batch_size))
    was_training = clip.model.training
    clip.model.eval()
    try:
        with torch.no_grad():
            batches = _encode_batches(clip, task, ranks, workers, progress)
            if task.kind == "retrieval":
                metrics = _retrieval(clip, task, ranks, batches)
            else:
                classifier = _class_vectors(clip, task, ranks, batch_size)
                score = _classification if task.kind == "classification" else _multilabel
                metrics = score(task, ranks, classifier, batches)
    finally:
        clip.model.train(was_training)
    name = "zeroshot_retrieval" if task.kind == "retrieval" else "zeroshot_classification"
    return TaskScores(task.folder.name, name, task.samples, metrics)


def task_scores(
    clip: Clip, tasks: Sequence[Path], ranks: Ranks = ONE_PROCESS, workers: int = 0
) -> Iterator[tuple[str, float]]:
    """Yield the name, like ``TASK/acc1``, and the value of every metric of these tasks."""
    for folder in tasks:
        scores = evaluate_task(clip, folder, ranks, workers=workers)
        for metric, value in scores.metrics.items():
            yield f"{scores.name}/{metric}", value


# --- the work of several ranks ----------------------------------------------------------------------------------


class _EncodedBatch(NamedTuple):
    """Unit features and labels of consecutive samples, rows ``first`` on of the task."""

    first: int
    images: Tensor  # [b, d]
    labels: list[Any]


def _encode_batches(
    clip: Clip, task: Task, ranks: Ranks, workers: int, progress: Progress | None
) -> Iterator[_EncodedBatch]:
    """Yield this rank's batches, equally many on every rank: a sharded model needs all ranks for each call.

    A rank without a batch in the last round encodes a blank image and yields no rows.
    """
    own = ranks.own_indices(len(task.batches))
    decoder = BatchDecoder(task, clip.in_bytes(clip.preprocess))
    pool: Workers[int, DecodedBatch] = Workers(decoder, min(workers, len(own)), pin_memory=clip.device.type == "cuda")
    with closing(pool):
        decoded = pool.map(own)
        for turn in range(ranks.rounds(len(task.batches))):
            item = ranks.run_on_all_or_fail(lambda: next(decoded, None))
            if item is None:
                blank = clip.preprocess(Image.new("RGB", (8, 8)))[None]
                _finite_unit_features(clip.encode_image(blank), "image", ranks)
                yield _EncodedBatch(0, torch.empty(0), [])
            else:
                features = _finite_unit_features(clip.encode_image(item.images), "image", ranks)
                yield _EncodedBatch(task.batches[own[turn]].first, features, list(item.labels))
            if progress is not None:
                last = task.batches[min((turn + 1) * ranks.count, len(task.batches)) - 1]
                progress(last.first + len(last.spans), task.samples)


def _finite_unit_features(features: Tensor, what: str, ranks: Ranks) -> Tensor:  # [b, d] -> [b, d]
    bad = int((~features.isfinite()).any(dim=1).sum())
    problem = (
        f"the model gives {bad} of {len(features)} {what} features that are not finite: take an earlier checkpoint"
    )
    ranks.raise_on_all(UserError(problem) if bad else None)
    return F.normalize(features.float(), dim=-1)


# --- the metrics ------------------------------------------------------------------------------------------------


def _class_vectors(clip: Clip, task: Task, ranks: Ranks, batch_size: int) -> Tensor:  # [c, d]
    """Return the unit vector of each class; classes of one name have equal vectors, to the last bit."""
    names = list(dict.fromkeys(task.classes))
    per_call = max(1, batch_size // len(task.templates))
    chunks = [names[start : start + per_call] for start in range(0, len(names), per_call)]
    own = ranks.own_indices(len(chunks))
    vectors = torch.empty(0)
    for turn in range(ranks.rounds(len(chunks))):
        chunk = chunks[own[turn]] if turn < len(own) else chunks[-1]
        prompts = [template.replace("{c}", name) for name in chunk for template in task.templates]
        features = _finite_unit_features(clip.encode_text(prompts), "text", ranks).unflatten(
            0, (len(chunk), len(task.templates))
        )
        if not vectors.numel():
            vectors = torch.zeros(len(names), features.shape[-1], device=clip.device)
        if turn < len(own):
            start = own[turn] * per_call
            vectors[start : start + len(chunk)] = F.normalize(features.mean(dim=1), dim=-1)
    ranks.sum(vectors)
    position = {name: number for number, name in enumerate(names)}
    return vectors[[position[name] for name in task.classes]]


def _classification(task: Task, ranks: Ranks, classifier: Tensor, batches: Iterable[_EncodedBatch]) -> dict[str, float]:
    classes = len(classifier)
    numbers = torch.arange(classes, device=classifier.device)
    # Per class: samples, samples with that class first, samples with that class among the first 5.
    counts = torch.zeros(3, classes, dtype=torch.int64, device=classifier.device)
    for batch in batches:
        if batch.labels:
            labels = torch.tensor(batch.labels, device=classifier.device)
            ahead = wrong_items_ahead(batch.images, classifier, labels, numbers, _ITEMS)
            for row, chosen in enumerate((labels, labels[ahead < 1], labels[ahead < 5])):
                counts[row] += chosen.bincount(minlength=classes)
    samples, first, first_five = ranks.sum(counts).cpu().double()
    present = samples > 0
    metrics = {"acc1": (first.sum() / task.samples).item()}
    if classes >= 5:
        metrics["acc5"] = (first_five.sum() / task.samples).item()
    return metrics | {"mean_per_class_recall": (first[present] / samples[present]).mean().item()}


def _multilabel(task: Task, ranks: Ranks, classifier: Tensor, batches: Iterable[_EncodedBatch]) -> dict[str, float]:
    scores = torch.zeros(len(classifier), task.samples, device=classifier.device)
    labels = torch.zeros(scores.shape, dtype=torch.uint8, device=classifier.device)
    for first, images, own in batches:
        if own:
            rows = slice(first, first + len(own))
            scores[:, rows] = classifier @ images.T
            labels[:, rows] = torch.stack(own, dim=1).to(classifier.device)
    ranks.sum(scores)
    ranks.sum(labels)
    return {"mean_average_precision": mean_average_precision(scores, labels)}


def _retrieval(clip: Clip, task: Task, ranks: Ranks, batches: Iterable[_EncodedBatch]) -> dict[str, float]:
    images = torch.empty(0)
    captions = torch.zeros(task.samples, dtype=torch.int64, device=clip.device)  # how many each image has
    own = Rows()  # this rank's captions
    is_own = torch.zeros(task.samples, dtype=torch.bool, device=clip.device)
    for first, features, labels in batches:
        flat = [caption for some in labels for caption in some]
        text = _finite_unit_features(clip.encode_text(flat or [""]), "text", ranks)
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
    """Return R@k for each k up to the number of items."""
    found = torch.zeros(len(RECALL_AT), dtype=torch.int64, device=queries.device)
    tiles = queries.split(_QUERIES)
    for number in ranks.own_indices(len(tiles)):
        labels = query_labels[number * _QUERIES : (number + 1) * _QUERIES]
        ahead = wrong_items_ahead(tiles[number], items, labels, item_labels, _ITEMS)
        found += torch.stack([(ahead < k).sum() for k in RECALL_AT])
    shares = (ranks.sum(found).double() / len(queries)).tolist()
    return {k: share for k, share in zip(RECALL_AT, shares, strict=True) if k <= len(items)}
