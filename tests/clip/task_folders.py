"""Small zero-shot tasks in CLIP_benchmark's folder layout: classes, captions and labels of noise."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.evaluation.tasks import evaluate_task, open_tasks

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


TASKS = {"classification": classification, "retrieval": retrieval, "multilabel": multilabel}


def evaluate(clip, folder, ranks=ONE_PROCESS, progress=None, **options):
    """Open a task and score a model on it."""
    (task,) = ranks.run_on_all_or_fail(lambda: open_tasks([folder]))
    return evaluate_task(Encoder(clip, ranks, **options), task, progress)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in numbers."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.size = max([self.size, *(part.numel() for part in made if isinstance(part, torch.Tensor))])
        return result
