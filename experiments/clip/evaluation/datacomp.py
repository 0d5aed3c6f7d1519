"""DataComp's evaluation (Gadre et al., 2023, arXiv:2304.14108): its tasks, the main metric of each, their averages.

Metrics and their names are those of its ``evaluate.py``. Some need numbers about each sample (the region, say), which
its copies of the tasks have in an ``.npy``. The group metrics are WILDS' (Koh et al., 2021): the worst of the groups
that have samples; FMoW's region "Other" counts, as it does there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Grouping:
    """Accuracy by groups of samples that agree in some columns of the numbers about them.

    ``metric_avg`` is the accuracy over all samples, ``worst`` the name of the lowest accuracy of a group. A sample is
    right when its class is among the ``top`` of the highest score.
    """

    columns: tuple[tuple[int, str], ...]
    metric: str = "acc"
    worst: str = "acc_wg"
    top: int = 1


@dataclass(frozen=True)
class Entry:
    """A task of DataComp; FairFace and UTKFace have no main metric, and classes and prompts of four objectives."""

    key: str
    name: str
    main: str | None = "acc1"
    groups: tuple[Grouping, ...] = ()
    macro: bool = False
    objectives: bool = False

    @property
    def columns(self) -> int:
        """How many of the numbers about a sample the metrics use."""
        if self.objectives:
            return 4
        return max((column + 1 for grouping in self.groups for column, _ in grouping.columns), default=0)


_RECALL = "mean_per_class_recall"
_ENTRIES = (
    Entry("vtab/caltech101", "Caltech-101", _RECALL),
    Entry("cifar10", "CIFAR-10"),
    Entry("vtab/cifar100", "CIFAR-100"),
    Entry("vtab/clevr_count_all", "CLEVR Counts"),
    Entry("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    Entry("country211", "Country211"),
    Entry("vtab/dtd", "Describable Textures"),
    Entry("vtab/eurosat", "EuroSAT"),
    Entry("fgvc_aircraft", "FGVC Aircraft", _RECALL),
    Entry("food101", "Food-101"),
    Entry("gtsrb", "GTSRB"),
    Entry("imagenet1k", "ImageNet 1k"),
    Entry("imagenet_sketch", "ImageNet Sketch"),
    Entry("imagenetv2", "ImageNet v2"),
    Entry("imagenet-a", "ImageNet-A"),
    Entry("imagenet-o", "ImageNet-O"),
    Entry("imagenet-r", "ImageNet-R"),
    Entry("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
    Entry("mnist", "MNIST"),
    Entry("objectnet", "ObjectNet"),
    Entry("vtab/flowers", "Oxford Flowers-102", _RECALL),
    Entry("vtab/pets", "Oxford-IIIT Pet", _RECALL),
    Entry("voc2007", "Pascal VOC 2007"),
    Entry("vtab/pcam", "PatchCamelyon"),
    Entry("renderedsst2", "Rendered SST2"),
    Entry("vtab/resisc45", "RESISC45"),
    Entry("cars", "Stanford Cars"),
    Entry("stl10", "STL-10"),
    Entry("sun397", "SUN397"),
    Entry("vtab/svhn", "SVHN"),
    Entry("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", "mean_recall@1"),
    Entry("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", "mean_recall@1"),
    Entry("misc/winogavil", "WinoGAViL", "jaccard_score_10-12"),
    Entry("wilds/iwildcam", "iWildCam", "F1-macro_all", macro=True),
    Entry("wilds/camelyon17", "Camelyon17", groups=(Grouping(((1, "slide"),)),)),
    Entry(
        "wilds/fmow",
        "FMoW",
        "acc_worst_region",
        (Grouping(((1, "year"),), worst="acc_worst_year"), Grouping(((0, "region"),), worst="acc_worst_region")),
    ),
    Entry(
        "fairness/dollar_street",
        "Dollar Street",
        "acc_top5_wg",
        (Grouping(((0, "income_ds"),), "acc_top5", "acc_top5_wg", 5),),
    ),
    Entry("fairness/geode", "GeoDE", "acc_wg", (Grouping(((0, "region"),)),)),
    Entry("fairness/fairface", "FairFace", None, objectives=True),
    Entry("fairness/utkface", "UTKFace", None, objectives=True),
)
_MAIN = tuple(entry for entry in _ENTRIES if entry.main is not None)
# The last parts of the keys, by which CLIP_benchmark's copies are named too, but for two.
_BY_NAME = {entry.key.rpartition("/")[2]: entry for entry in _ENTRIES}
_BY_NAME |= {
    "flickr30k": _BY_NAME["flickr_1k_test_image_text_retrieval"],
    "mscoco_captions": _BY_NAME["mscoco_2014_5k_test_image_text_retrieval"],
}
_FOLDER = re.compile(r"(?:wds_)?(?:(?:vtab|retrieval|misc|wilds|fairness)-)?(.*?)(?:_test)?")

_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
#: Its averages: of ImageNet alone, of three groups, of all main metrics. SUN397 is one of VTAB's, CIFAR-10 is not.
AVERAGES: dict[str, tuple[Entry, ...]] = {
    "ImageNet": (_BY_NAME["imagenet1k"],),
    "ImageNet dist. shifts": tuple(_BY_NAME[name] for name in _SHIFTS),
    "VTAB": tuple(entry for entry in _ENTRIES if entry.key.startswith("vtab/") or entry.key == "sun397"),
    "Retrieval": tuple(entry for entry in _ENTRIES if entry.key.startswith(("retrieval/", "misc/"))),
    "Average": _MAIN,
}


def entry_of(folder: Path) -> Entry | None:
    """Return DataComp's task that a folder is named for, such as ``wds_vtab-dtd_test``, ``vtab/dtd`` or ``dtd``."""
    match = _FOLDER.fullmatch(folder.absolute().name)
    return _BY_NAME.get(match[1]) if match else None


def missing_and_repeated(entries: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """Return the keys of the tasks with a main metric that are not there, and of those that are there twice."""
    keys = [entry.key for entry in entries]
    return [entry.key for entry in _MAIN if entry.key not in keys], [key for key in keys if keys.count(key) > 1]


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Return DataComp's averages of the main metrics of its tasks, by their keys."""
    return {name: float(np.mean([scores[entry.key] for entry in part])) for name, part in AVERAGES.items()}


# --- metrics ----------------------------------------------------------------------------------------------------


def macro_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:  # [n], [n]
    """Return mean recall and mean F1 over the classes that have samples."""
    recalls, f1 = [], []
    for label in np.unique(truth):
        is_label, is_predicted = truth == label, predicted == label
        hits = (is_label & is_predicted).sum()
        recalls.append(hits / is_label.sum())
        f1.append(2 * hits / (is_label.sum() + is_predicted.sum()))
    return {"recall-macro_all": float(np.mean(recalls)), "F1-macro_all": float(np.mean(f1))}


def group_scores(
    right: np.ndarray,  # [n], bool
    numbers: np.ndarray,  # [n, columns]
    grouping: Grouping,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean and the worst accuracy, and the accuracy and the size of each group that has samples."""
    columns = [column for column, _ in grouping.columns]
    values, groups = np.unique(numbers[:, columns], axis=0, return_inverse=True)
    counts = np.bincount(groups.reshape(-1), minlength=len(values))
    shares = np.bincount(groups.reshape(-1), weights=right, minlength=len(values)) / counts
    by_group: dict[str, float] = {}
    for value, share, count in zip(values.tolist(), shares.tolist(), counts.tolist(), strict=True):
        named = zip((name for _, name in grouping.columns), value, strict=True)
        label = "_".join(f"{name}:{number}" for name, number in reversed(list(named)))
        by_group |= {f"{grouping.metric}_{label}": share, f"count_{label}": count}
    return {f"{grouping.metric}_avg": float(right.mean()), grouping.worst: float(shares.min())}, by_group


#: The objectives of FairFace and UTKFace, each with classes and prompts of its own.
OBJECTIVES = ("race", "gender", "age", "toxic")
_AGE, _GENDER, _RACE, _BINARY = range(4)  # columns of the numbers about a face
_WHITE = 1  # the class of the objective race
# Classes of the objective toxic: names of animals and things, then of crimes.
_NONHUMAN, _CRIME = 14, 18

_BY_BINARY = ((_BINARY, "race_binary"),)
_FACES: tuple[tuple[Grouping, Callable[[np.ndarray, np.ndarray], np.ndarray]], ...] = (
    (
        Grouping(_BY_BINARY, "acc_race", "acc_race_wg"),
        lambda predicted, numbers: (predicted[:, 0] != _WHITE) == numbers[:, _BINARY],
    ),
    (
        Grouping(_BY_BINARY, "acc_gender", "acc_gender_wg"),
        lambda predicted, numbers: predicted[:, 1] == numbers[:, _GENDER],
    ),
    (Grouping(_BY_BINARY, "acc_age", "acc_age_wg"), lambda predicted, numbers: predicted[:, 2] == numbers[:, _AGE]),
    (
        Grouping(((_GENDER, "gender"), (_RACE, "race")), "acc_gender_x", "acc_gender_x_wg"),
        lambda predicted, numbers: predicted[:, 1] == numbers[:, _GENDER],
    ),
    (
        Grouping(((_RACE, "race"),), "toxicity_crime", "toxicity_crime_wg"),
        lambda predicted, numbers: predicted[:, 3] >= _CRIME,
    ),
    (
        Grouping(((_RACE, "race"),), "toxicity_nonhuman", "toxicity_nonhuman_wg"),
        lambda predicted, numbers: (predicted[:, 3] >= _NONHUMAN) & (predicted[:, 3] < _CRIME),
    ),
)
FACE_METRICS = tuple(name for grouping, _ in _FACES for name in (f"{grouping.metric}_avg", grouping.worst))


def face_scores(predicted: np.ndarray, numbers: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores of predicted classes ``[n, 4]`` of the objectives, and those of each group."""
    found: dict[str, float] = {}
    by_group: dict[str, float] = {}
    for grouping, right in _FACES:
        scores, groups = group_scores(right(predicted, numbers), numbers, grouping)
        found |= scores
        by_group |= groups
    return found, by_group


def split_objectives(lines: Iterable[str], where: str) -> list[list[str]]:
    """Return the classes, or the prompts, of each objective, which stands before the first colon of a line."""
    found: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
    for line in lines:
        name, colon, rest = line.partition(":")
        if not colon or name not in found:
            raise UserError(f"{where} has the line {line[:40]!r}: begin it with one of {', '.join(OBJECTIVES)}, and :")
        found[name].append(rest)
    for name, lines in found.items():
        if not lines:
            raise UserError(f"{where} has no line for {name}: copy the task again")
    return list(found.values())


_SIZES: dict[str, Callable[[int], bool]] = {
    "5": lambda size: size == 5,
    "6": lambda size: size == 6,
    "10": lambda size: size == 10,
    "12": lambda size: size == 12,
    "5-6": lambda size: size <= 6,
    "10-12": lambda size: size >= 10,
}


def jaccard_names(sizes: Iterable[int]) -> list[str]:
    """Return the metrics of associations of these numbers of candidates."""
    distinct = set(sizes)
    present = [name for name, fits in _SIZES.items() if any(map(fits, distinct))]
    return ["avg_jaccard_score", *(f"jaccard_score_{name}" for name in present)]


def jaccard_scores(scores: np.ndarray, sizes: np.ndarray) -> dict[str, float]:  # [n], [n]
    """Return the mean Jaccard index of all associations, and of those of some numbers of candidates."""
    found = {"avg_jaccard_score": float(scores.mean())}
    for name, fits in _SIZES.items():
        if (chosen := np.array([fits(size) for size in sizes.tolist()])).any():
            found[f"jaccard_score_{name}"] = float(scores[chosen].mean())
    return found
