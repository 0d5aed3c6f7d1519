"""Small zero-shot tasks in CLIP_benchmark's folder layout: classes, captions and labels of noise."""

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.evaluation.tasks import evaluate_task, open_tasks
from tests.clip.tars import write_tar

CLASSES = ["latin small letter a", "greek capital letter omega", "comma", "digit two", "snowman", "black square"]
TEMPLATES = ["{c}", "a drawing of {c}", "{c} in bold"]


def picture(seed, suffix="png"):
    noise = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    data = io.BytesIO()
    kind, options = {"png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {"lossless": True})}[suffix]
    Image.fromarray(noise).save(data, kind, **options)
    return data.getvalue()


def npy(label):
    data = io.BytesIO()
    np.save(data, np.asarray(label), allow_pickle=True)
    return data.getvalue()


def write_task(folder, shards, kind=None, classes=CLASSES, templates=TEMPLATES):
    """``shards``: each a list of (member name, bytes)."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    if kind is not None:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    for number, members in enumerate(shards):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def samples(labels, suffix, first=0, images=("png", "jpg", "webp")):
    """Members of a shard: an image of noise and a label each."""
    members = []
    for number, label in enumerate(labels, first):
        image = images[number % len(images)]
        members += [(f"s{number:07d}.{image}", picture(number, image)), (f"s{number:07d}.{suffix}", label)]
    return members


LABELS = [0, 1, 2, 1, 1, 3, 5, 5, 0, 1, 2]  # none of class 4
CAPTIONS = [["comma"], ["digit two", "two"], ["snowman", "snow", "man"], ["omega"], ["a"], ["b", "c"], ["full stop"]]
TARGETS = np.random.default_rng(5).random((len(LABELS), len(CLASSES))) < 0.4
TARGETS[:, 4] = False


def classification(folder):
    data = [str(label).encode() for label in LABELS]
    return write_task(folder, [samples(data[:7], "cls"), samples(data[7:], "cls", 7)])


def retrieval(folder):
    data = ["\n".join(captions).encode() for captions in CAPTIONS]
    return write_task(folder, [samples(data[:2], "txt"), samples(data[2:], "txt", 2)], "retrieval")


def multilabel(folder):
    data = [npy(row.astype(np.int64)) for row in TARGETS]
    return write_task(folder, [samples(data[:4], "npy"), samples(data[4:], "npy", 4)], "multilabel")


def rows(labels, numbers, first=0):
    """Members of a shard of one of DataComp's tasks: image, class and numbers about the sample."""
    members = []
    for number, (label, about) in enumerate(zip(labels, numbers, strict=True), first):
        key = f"s{number:07d}"
        members += [(f"{key}.cls", b"%d" % label), (f"{key}.npy", npy(about)), (f"{key}.png", picture(number))]
    return members


ABOUT = np.random.default_rng(7).integers(0, 4, (len(LABELS), 4))  # a group of one sample, and one of none


def with_groups(name):
    """A task of that name, in two shards, whose samples have four numbers each."""
    return lambda folder: write_task(folder / name, [rows(LABELS[:7], ABOUT[:7]), rows(LABELS[7:], ABOUT[7:], 7)])


FACE_CLASSES = {
    "race": ["black", "white", "east asian"],
    "gender": ["male", "female"],
    "age": ["child", "adult", "old"],
    "toxic": [f"toxic {number}" for number in range(22)],
}
FACE_TEMPLATES = {name: [f"a photo of a {{c}} {name}", "{c}"] for name in FACE_CLASSES}


def faces(folder):
    """The sample of a face has numbers about it and, here, a class that is not used."""
    about = ABOUT % [3, 2, 4, 2]
    lines = [[f"{k}:{line}" for k, own in each.items() for line in own] for each in (FACE_CLASSES, FACE_TEMPLATES)]
    return write_task(folder / "wds_fairface_test", [rows(LABELS, about)], None, *lines)


ASSOCIATIONS = [
    ("apple", ["a", "b", "c", "d", "e"], ["a", "c"]),
    ("Yard", ["b", "c", "d", "e", "f", "g"], ["g"]),
    ("umbrella", [f"x{k}" for k in range(10)], ["x1", "x4", "x8"]),
    ("rope", [f"y{k}" for k in range(12)], [f"y{k}" for k in range(0, 12, 2)]),
    ("night", ["a", "b", "c", "d", "e"], ["e"]),
]


def associations(folder):
    members, drawn = [], 0
    for number, (cue, candidates, right) in enumerate(ASSOCIATIONS):
        names = {"cue": cue, "candidates": candidates, "associations": right}
        members.append((f"{number:05d}.json", json.dumps(names).encode()))
        for k in range(len(candidates)):
            members.append((f"{number:05d}.{k}.jpg", picture(drawn, "jpg")))
            drawn += 1
    return write_task(folder / "wds_winogavil_test", [members], "association")


def class_folders(folder):
    """The images of `classification`, in a folder for each class that has some."""
    for number, label in enumerate(LABELS):
        suffix = ("png", "jpg", "webp")[number % 3]
        path = folder / "val" / CLASSES[label].replace(" ", "_") / f"{number}.{suffix.upper()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, suffix))
    (folder / "val" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder / "val"


DATACOMP = {
    "wds_wilds-iwildcam_test": with_groups("wds_wilds-iwildcam_test"),
    "wds_wilds-camelyon17_test": with_groups("wds_wilds-camelyon17_test"),
    "wds_wilds-fmow_test": with_groups("wds_wilds-fmow_test"),
    "wds_dollar_street_test": with_groups("wds_dollar_street_test"),
    "wds_geode_test": with_groups("wds_geode_test"),
    "wds_fairface_test": faces,
    "wds_winogavil_test": associations,
    "wds_flickr30k": lambda folder: retrieval(folder / "wds_flickr30k"),
}

TASKS = {"classification": classification, "retrieval": retrieval, "multilabel": multilabel}


def evaluate(clip, folder, ranks=ONE_PROCESS, progress=None, **options):
    """Open a task and score a model on it."""
    (task,) = ranks.run_on_all_or_fail(lambda: open_tasks([folder]))
    return evaluate_task(Encoder(clip, ranks, **options), task, progress)


PAIRS = 37
UNUSABLE = {5: b"damaged", 11: b"", 36: b"\xff\xd8 cut off"}


def pair_caption(number):
    return f"letter {chr(97 + number % 26)} of alphabet {number // 26}"


def write_catalog(folder, damaged=()):
    """Pairs of noise in two shards, some of whose images cannot be used."""
    members = []
    for number in range(PAIRS):
        image = UNUSABLE[number] if number in damaged else picture(number)
        members.append([(f"{number:03d}.png", image), (f"{number:03d}.txt", pair_caption(number).encode())])
    for shard, part in enumerate((members[:20], members[20:])):
        write_tar(folder / "shards" / f"{shard}.tar", [one for pair in part for one in pair])
    return make_catalog(str(folder / "shards" / "{0..1}.tar"), folder / "catalog")


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in numbers."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.size = max([self.size, *(part.numel() for part in made if isinstance(part, torch.Tensor))])
        return result
