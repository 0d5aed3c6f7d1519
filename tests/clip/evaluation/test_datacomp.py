"""DataComp's tasks by the names of their folders, its metrics by independent definitions, its averages."""

import io
import json
import pathlib
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score, recall_score
from task_folders import (
    ABOUT,
    ASSOCIATIONS,
    CLASSES,
    DATACOMP,
    FACE_CLASSES,
    FACE_TEMPLATES,
    LABELS,
    TEMPLATES,
    evaluate,
    picture,
    rows,
    samples,
    write_task,
)

from experiments.clip.errors import UserError
from experiments.clip.evaluation.datacomp import AVERAGES, Grouping, averages, entry_of, group_scores, macro_scores
from experiments.clip.evaluation.tasks import check_datacomp, metric_names, open_tasks

#: The names of its ``aggregate_scores.py``.
SHIFTS = {"ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"}
VTAB = {
    *("Caltech-101", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Describable Textures", "EuroSAT"),
    *("KITTI Vehicle Distance", "Oxford Flowers-102", "Oxford-IIIT Pet", "PatchCamelyon", "RESISC45", "SVHN", "SUN397"),
}


def test_averages_are_of_datacomps_groups():
    names = {name: {entry.name for entry in part} for name, part in AVERAGES.items()}
    assert names["ImageNet"] == {"ImageNet 1k"}
    assert (names["ImageNet dist. shifts"], names["VTAB"]) == (SHIFTS, VTAB)
    assert names["Retrieval"] == {"Flickr", "MSCOCO", "WinoGAViL"}
    assert len(AVERAGES["Average"]) == 38
    scores = {entry.key: 0.5 + 0.01 * number for number, entry in enumerate(AVERAGES["Average"])}
    found = averages(scores)
    assert found["Average"] == pytest.approx(sum(scores.values()) / 38)
    assert found["Retrieval"] == pytest.approx(
        np.mean([value for key, value in scores.items() if key.startswith(("retrieval/", "misc/"))])
    )


def test_main_metrics_are_accuracy_but_for_eleven_tasks():
    others = {entry.name: entry.main for entry in AVERAGES["Average"] if entry.main != "acc1"}
    recall = ("Caltech-101", "FGVC Aircraft", "Oxford Flowers-102", "Oxford-IIIT Pet")
    assert others == {
        **dict.fromkeys(recall, "mean_per_class_recall"),
        **dict.fromkeys(("Flickr", "MSCOCO"), "mean_recall@1"),
        "WinoGAViL": "jaccard_score_10-12",
        "iWildCam": "F1-macro_all",
        "FMoW": "acc_worst_region",
        "Dollar Street": "acc_top5_wg",
        "GeoDE": "acc_wg",
    }


@pytest.mark.parametrize(
    "folder, key",
    [
        ("wds_vtab-clevr_closest_object_distance_test", "vtab/clevr_closest_object_distance"),
        ("vtab/dtd", "vtab/dtd"),
        ("wds_vtab-cifar10", "cifar10"),
        ("cifar10", "cifar10"),
        ("wds_imagenet-a_test", "imagenet-a"),
        ("imagenet1k", "imagenet1k"),
        ("wds_wilds-fmow_test", "wilds/fmow"),
        ("wds_dollar_street_test", "fairness/dollar_street"),
        ("wds_mscoco_captions", "retrieval/mscoco_2014_5k_test_image_text_retrieval"),
        ("retrieval/flickr_1k_test_image_text_retrieval", "retrieval/flickr_1k_test_image_text_retrieval"),
        ("wds_winogavil_test", "misc/winogavil"),
        ("voc2007_multilabel", None),
        ("glyph-names", None),
        ("my_cars_test", None),
    ],
)
def test_tasks_are_known_by_their_folders(folder, key):
    entry = entry_of(Path("wds") / folder)
    assert (None if entry is None else entry.key) == key


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    generator = np.random.default_rng(0)
    return generator.integers(0, 7, 200), generator.integers(0, 9, 200), generator.integers(0, 5, (200, 3))


def test_macro_scores_are_sklearns_over_the_classes_that_have_samples(drawn):
    truth, predicted, _ = drawn
    found = macro_scores(truth, predicted)
    labels = np.unique(truth)
    assert found["F1-macro_all"] == pytest.approx(f1_score(truth, predicted, labels=labels, average="macro"), abs=1e-15)
    assert found["recall-macro_all"] == pytest.approx(
        recall_score(truth, predicted, labels=labels, average="macro"), abs=1e-15
    )


def by_hand(right, groups):
    return {group: np.mean([r for r, g in zip(right, groups, strict=True) if g == group]) for group in set(groups)}


def test_groups_are_of_equal_numbers_in_the_columns(drawn):
    truth, predicted, numbers = drawn
    right = truth == predicted
    scores, groups = group_scores(right, numbers, Grouping(((0, "gender"), (2, "race")), "acc", "acc_worst"))
    expected = by_hand(right, [(a, b) for a, _, b in numbers.tolist()])
    assert scores == {"acc_avg": right.mean(), "acc_worst": pytest.approx(min(expected.values()))}
    counts = Counter((a, b) for a, _, b in numbers.tolist())
    assert groups == {f"acc_race:{b}_gender:{a}": pytest.approx(value) for (a, b), value in expected.items()} | {
        f"count_race:{b}_gender:{a}": count for (a, b), count in counts.items()
    }


@torch.no_grad()
def features(clip, pictures):
    images = torch.stack([clip.preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
    return F.normalize(clip.model.encode_image(images), dim=-1)


@torch.no_grad()
def vectors(clip, classes, templates):
    rows = []
    for name in classes:
        text = clip.model.encode_text(clip.tokenize([line.replace("{c}", name) for line in templates]))
        rows.append(F.normalize(F.normalize(text, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def scores(reference):
    """Inner products of the pictures and the classes, their order, and the labels."""
    found = features(reference, [picture(k) for k in range(len(LABELS))]) @ vectors(reference, CLASSES, TEMPLATES).T
    return found.argsort(dim=1, descending=True).numpy(), np.array(LABELS)


@pytest.mark.parametrize(
    "name, top, column, prefix, worst",
    [
        ("wds_wilds-camelyon17_test", 1, 1, "acc", "acc_wg"),
        ("wds_wilds-fmow_test", 1, 0, "acc", "acc_worst_region"),
        ("wds_wilds-fmow_test", 1, 1, "acc", "acc_worst_year"),
        ("wds_dollar_street_test", 5, 0, "acc_top5", "acc_top5_wg"),
        ("wds_geode_test", 1, 0, "acc", "acc_wg"),
    ],
)
def test_the_worst_group_is_of_the_numbers_beside_the_samples(
    name, top, column, prefix, worst, reference, scores, tmp_path
):
    order, labels = scores
    found = evaluate(reference, DATACOMP[name](tmp_path), batch_size=4)
    right = (order[:, :top] == labels[:, None]).any(axis=1)
    shares = by_hand(right, ABOUT[:, column].tolist())
    assert found.metrics[worst] == pytest.approx(min(shares.values()))
    assert found.metrics[f"{prefix}_avg"] == pytest.approx(right.mean())
    assert found.main == {"acc_worst_year": "acc_worst_region"}.get(
        worst, worst if name != "wds_wilds-camelyon17_test" else "acc1"
    )
    field = {"camelyon17": "slide", "fmow": ("region", "year")[column], "dollar_street": "income_ds", "geode": "region"}
    for group, share in shares.items():
        key = f"{prefix}_{field[name.removeprefix('wds_').removeprefix('wilds-').removesuffix('_test')]}:{group}"
        assert found.groups[key] == pytest.approx(share)


def test_iwildcam_has_macro_scores(reference, scores, tmp_path):
    order, labels = scores
    found = evaluate(reference, DATACOMP["wds_wilds-iwildcam_test"](tmp_path), batch_size=4)
    f1 = f1_score(labels, order[:, 0], labels=np.unique(labels), average="macro")
    assert (found.main, found.metrics["F1-macro_all"]) == ("F1-macro_all", pytest.approx(f1))


def test_faces_have_four_objectives_and_no_main_metric(reference, tmp_path):
    found = evaluate(reference, DATACOMP["wds_fairface_test"](tmp_path), batch_size=4)
    images = features(reference, [picture(k) for k in range(len(LABELS))])
    race, gender, age, toxic = (
        (images @ vectors(reference, FACE_CLASSES[name], FACE_TEMPLATES[name]).T).argmax(dim=1).numpy()
        for name in FACE_CLASSES
    )
    about = ABOUT % [3, 2, 4, 2]
    expected = {
        "acc_race": ((race != 1) == about[:, 3], about[:, 3]),
        "acc_gender": (gender == about[:, 1], about[:, 3]),
        "acc_age": (age == about[:, 0], about[:, 3]),
        "acc_gender_x": (gender == about[:, 1], [(a, b) for a, b in about[:, 1:3].tolist()]),
        "toxicity_crime": (toxic >= 18, about[:, 2]),
        "toxicity_nonhuman": ((toxic >= 14) & (toxic < 18), about[:, 2]),
    }
    assert found.metrics == {
        f"{name}{ending}": pytest.approx(value)
        for name, (right, groups) in expected.items()
        for ending, value in (("_avg", right.mean()), ("_wg", min(by_hand(right, list(groups)).values())))
    }
    assert found.main is None


@torch.no_grad()
def test_associations_are_scored_by_the_jaccard_index(reference, tmp_path):
    found = evaluate(reference, DATACOMP["wds_winogavil_test"](tmp_path), batch_size=2)
    values, drawn = [], 0
    for cue, candidates, right in ASSOCIATIONS:
        images = features(reference, [picture(drawn + k, "jpg") for k in range(len(candidates))])
        drawn += len(candidates)
        prompt = f"An {cue}" if cue in ("apple", "umbrella") else f"A {cue.lower()}"
        best = (images @ reference.encode_text([prompt])[0]).argsort(descending=True)[: len(right)]
        truth = np.isin(candidates, right)
        values.append(jaccard_score(truth, np.isin(np.arange(len(candidates)), best.numpy())))
    values = np.array(values)
    expected = {"avg": values, "5": values[[0, 4]], "6": values[1:2], "10": values[2:3], "12": values[3:4]}
    expected |= {"5-6": values[[0, 1, 4]], "10-12": values[2:4]}
    assert found.metrics == {
        "avg_jaccard_score" if name == "avg" else f"jaccard_score_{name}": pytest.approx(value.mean())
        for name, value in expected.items()
    }
    assert (found.main, found.samples, found.task) == ("jaccard_score_10-12", 5, "association")


def test_retrieval_has_the_mean_of_both_sides(reference, tmp_path):
    metrics = evaluate(reference, DATACOMP["wds_flickr30k"](tmp_path)).metrics
    both = metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]
    assert metrics["mean_recall@1"] == both / 2


@pytest.mark.parametrize("name", DATACOMP)
def test_metrics_are_known_before_anything_is_scored(name, reference, tmp_path):
    (task,) = open_tasks([DATACOMP[name](tmp_path)])
    names = metric_names(task)
    found = evaluate(reference, task.folder).metrics
    assert set(names) <= found.keys() and found.keys() - set(names) <= {"text_retrieval_recall@10"}


# --- what is missing or damaged -------------------------------------------------------------------------------------


def test_data_of_a_name_without_the_numbers_are_a_plain_task(reference, tmp_path):
    for name in ("geode", "fairface"):
        folder = write_task(tmp_path / name, [samples([b"1", b"2"], "cls")])
        assert evaluate(reference, folder).metrics.keys() == {"acc1", "acc5", "mean_per_class_recall"}
    with pytest.raises(UserError, match=r"--datacomp: .*geode has not what acc_wg needs"):
        check_datacomp(open_tasks([tmp_path / "geode"]))


def test_all_tasks_are_asked_for_and_each_once(tmp_path):
    folders = [DATACOMP[name](tmp_path) for name in ("wds_wilds-fmow_test", "wds_geode_test")]
    with pytest.raises(UserError, match=r"no folder of vtab/caltech101, cifar10, [^:]*: name the missing ones"):
        check_datacomp(open_tasks(folders))


@pytest.mark.parametrize(
    "about, message",
    [
        ([1], r"not a row of 2 numbers or more, but an array of shape \(1,\)"),
        ([[1, 2]], r"an array of shape \(1, 2\)"),
        ([1.0, 0.5], "numbers that are not whole"),
        ([1.0, np.nan], "numbers that are not whole"),
        (["a", "b"], "not a row of 2 numbers"),
        ([None, 1], "allow_pickle=False"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(about, message, reference, tmp_path):
    folder = write_task(tmp_path / "wds_wilds-fmow_test", [rows([1, 2], [[0, 1, 2], about])])
    with pytest.raises(UserError, match=rf"s0000001\.cls in .*{message}"):
        evaluate(reference, folder)


@pytest.mark.parametrize(
    "stored, message",
    [
        (b"[]", "is of no use"),
        (b'{"cue": "a"}', "is of no use"),
        (b'{"cue": "", "candidates": ["a", "b"], "associations": ["a"]}', "the cue is no word"),
        (b'{"cue": "c", "candidates": "ab", "associations": "a"}', "are no lists"),
        (b'{"cue": "c", "candidates": ["a"], "associations": ["a"]}', "1 candidates, but 2 images"),
        (b'{"cue": "c", "candidates": ["a", "b"], "associations": ["d"]}', "none of the candidates"),
        (b'{"cue": "' + b"c" * 60_000 + b'", "candidates": ["a", "b"], "associations": ["a"]}', "60000 characters"),
        (b"[" * 100_000, "is of no use"),
    ],
)
def test_associations_that_are_none_are_refused_by_name(stored, message, reference, tmp_path):
    members = [("0.json", stored), ("0.0.jpg", picture(0, "jpg")), ("0.1.jpg", picture(1, "jpg"))]
    folder = write_task(tmp_path / "winogavil", [members], "association")
    with pytest.raises(UserError, match=rf"0\.json in .*{message}"):
        evaluate(reference, folder)


def test_candidates_are_bounded(reference, tmp_path):
    names = {"cue": "c", "candidates": list(range(40)), "associations": [1]}
    members = [("0.json", json.dumps(names).encode()), *((f"0.{k}.jpg", picture(0, "jpg")) for k in range(40))]
    folder = write_task(tmp_path / "winogavil", [members], "association")
    with pytest.raises(UserError, match="40 candidates, but 32 images"):
        evaluate(reference, folder)


README = Path(__file__).parents[3] / "experiments" / "clip" / "README.md"


class WrittenRows(list):
    """Rows as the Hugging Face data set nlphuji/winogavil has them."""

    def __init__(self):
        super().__init__()
        drawn = 0
        for cue, candidates, right in ASSOCIATIONS:
            images = [Image.open(io.BytesIO(picture(drawn + k))) for k in range(len(candidates))]
            drawn += len(candidates)
            self.append({"cue": cue, "candidates": candidates, "associations": right, "candidate_images": images})


def test_winogavil_is_written_as_the_readme_says(reference, tmp_path, monkeypatch):
    """The package `datasets`, which would fetch it, is the one part that is not the real one."""
    (lines,) = re.findall(r"```python\nimport datasets, .*?\n\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    datasets = SimpleNamespace(load_dataset=lambda name, split: WrittenRows())
    exec(lines, {"datasets": datasets, "json": json, "pathlib": pathlib, "webdataset": webdataset})
    (task,) = open_tasks([Path("wds/wds_winogavil_test")])
    assert (task.kind, task.samples) == ("association", len(ASSOCIATIONS))
    found = evaluate(reference, task.folder)
    assert 0 < found.metrics["jaccard_score_10-12"] <= 1
