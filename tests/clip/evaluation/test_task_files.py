"""A task's folder: members of other kinds, and damage of every sort, refused by name."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from task_folders import CLASSES, TASKS, classification, evaluate, npy, picture, samples, write_task

from experiments.clip.errors import UserError
from experiments.clip.evaluation.tasks import open_tasks


@pytest.fixture(params=TASKS)
def task(request, tmp_path):
    return TASKS[request.param](tmp_path / request.param)


def test_members_of_other_kinds_are_passed_over_unread(reference, task, tmp_path):
    expected = evaluate(reference, task)
    for path in (task / "test").glob("*.tar"):
        extended = tmp_path / "extended.tar"
        with tarfile.open(path) as old, tarfile.open(extended, "w") as new:
            for member in old.getmembers():
                data = old.extractfile(member).read()
                member.name = f"./{member.name.replace('.png', '.PNG')}"
                new.addfile(member, io.BytesIO(data))
                for suffix in ("json", "pickle", "pyd", "2.png", "PNG.txt"):
                    if member.name.lower().endswith(("png", "jpg", "webp")):
                        new.addfile(other := tarfile.TarInfo(f"{member.name.rsplit('.', 1)[0]}.{suffix}"))
                        assert other.size == 0
        extended.replace(path)
    assert evaluate(reference, task) == expected


# --- damage ---------------------------------------------------------------------------------------------------


def shorten(path):
    path.write_bytes(path.read_bytes()[:-11_000])


def flip_header(path):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[2].offset + 3] ^= 0x40
    path.write_bytes(data)


def rewrite(members):
    def damage(path):
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return damage


def bomb():
    data = io.BytesIO()
    Image.new("1", (9000, 9000)).save(data, "PNG")
    return data.getvalue()


def gif():
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "GIF")
    return data.getvalue()


def line():
    data = io.BytesIO()
    Image.new("L", (5000, 2)).save(data, "PNG")
    return data.getvalue()


def scans(count):
    """A progressive JPEG of 2048 x 2048 pixels whose last scan is repeated."""
    data = io.BytesIO()
    Image.new("L", (2048, 2048), 90).save(data, "JPEG", progressive=True)
    head, last, tail = data.getvalue().rpartition(b"\xff\xda")
    return head + (last + tail.removesuffix(b"\xff\xd9")) * count + b"\xff\xd9"


SHARD_DAMAGE = {
    "cut off": (shorten, r"0\.tar is damaged"),
    "a header damaged": (flip_header, r"0\.tar is damaged"),
    "not a tar": (lambda path: path.write_bytes(b"gone" * 500), r"0\.tar is damaged"),
    "empty file": (lambda path: path.write_bytes(b""), r"0\.tar is damaged"),
    "gone": (lambda path: path.unlink(), r"0\.tar is missing, one of the 1 shards that nshards\.txt counts"),
    "no samples": (rewrite([]), "hold no sample"),
    "no label": (rewrite([("a.png", picture(0))]), r"sample a of .*0\.tar has no member \.cls"),
    "no image": (rewrite([("a.cls", b"1")]), r"sample a of .*0\.tar has no member \.webp"),
    "two labels": (rewrite([("a.cls", b"1"), ("a.CLS", b"1"), ("a.png", picture(0))]), r"two members \.cls"),
    "large label": (rewrite([("a.cls", bytes(2**20 + 1)), ("a.png", picture(0))]), "1048577 bytes"),
    "class too high": (rewrite(samples([b"1", b"6"], "cls")), r"s0000001\.cls in .*class '6'.* lines for 0 to 5"),
    "class negative": (rewrite(samples([b"-1"], "cls")), r"class '-1'"),
    "class in words": (rewrite(samples([b"snowman"], "cls")), "class 'snowman'"),
    "class of bytes": (rewrite(samples([b"\xff\x80"], "cls")), r"s0000000\.cls"),
    "image damaged": (rewrite([("a.png", picture(0)[:-400]), ("a.cls", b"1")]), r"a\.png in .*0\.tar is of no use"),
    "image is text": (rewrite([("a.jpg", b"hello"), ("a.cls", b"1")]), r"a\.jpg in"),
    "image of another type": (rewrite([("a.png", gif()), ("a.cls", b"1")]), r"a\.png in"),
    "image of many scans": (rewrite([("a.jpg", scans(2000)), ("a.cls", b"1")]), r"a\.jpg in .*too many pixels"),
    "image of a line": (rewrite([("a.png", line()), ("a.cls", b"1")]), r"a\.png in .*extreme aspect ratio"),
    "image too large": (rewrite([("a.png", bomb()), ("a.cls", b"1")]), r"a\.png in .*too many pixels"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage, message", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE)
def test_damaged_shards_are_refused_by_name(damage, message, reference, tmp_path):
    folder = write_task(tmp_path / "task", [samples([b"1"] * 6, "cls")])
    damage(folder / "test" / "0.tar")
    with pytest.raises(UserError, match=message) as refusal:
        evaluate(reference, folder)
    assert "\n" not in str(refusal.value)


FILE_DAMAGE = {
    "no folder": (".", None, "task is no folder"),
    "no count": ("test/nshards.txt", None, r"nshards\.txt is missing"),
    "count in words": ("test/nshards.txt", b"two\n", "nshards.txt says 'two'"),
    "count of zero": ("test/nshards.txt", b"0", "nshards.txt says '0'"),
    "count too high": ("test/nshards.txt", b"3", r"2\.tar is missing"),
    "count without end": ("test/nshards.txt", b"9999999", r"2\.tar is missing, one of the 9999999 shards"),
    "count too low": ("test/nshards.txt", b"1", r"1\.tar is not among the 1 shards"),
    "no classes": ("classnames.txt", None, r"classnames\.txt is missing"),
    "empty classes": ("classnames.txt", b"", r"classnames\.txt is empty"),
    "long class": ("classnames.txt", b"a\n" * 5 + b"b" * 60_000, r"line 6 of .*classnames\.txt has 60000 characters"),
    "endless classes": ("classnames.txt", b"a\n" * 2**23 + b"b", r"classnames\.txt has more than 16777216 bytes"),
    "classes in latin-1": ("classnames.txt", b"caf\xe9\n", "as UTF-8"),
    "no templates": ("zeroshot_classification_templates.txt", None, r"templates\.txt is missing"),
    "empty template": ("zeroshot_classification_templates.txt", b"{c}\n\n", "line ''"),
    "long template": (
        "zeroshot_classification_templates.txt",
        b"{c}" + b"b" * 5000,
        "line 1 of .* has 5003 characters",
    ),
    "template without class": ("zeroshot_classification_templates.txt", b"{c}\na photo\n", "line 'a photo'"),
    "template of attributes": ("zeroshot_classification_templates.txt", b"{c} {c.__class__}\n", "use no other brace"),
    "unknown type": ("dataset_type.txt", b"captioning", "says 'captioning'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, content, message", FILE_DAMAGE.values(), ids=FILE_DAMAGE)
def test_damaged_files_are_refused_by_name(name, content, message, reference, tmp_path):
    folder = classification(tmp_path / "task")
    if content is not None:
        (folder / name).write_bytes(content)
    elif name == ".":
        shutil.rmtree(folder)
    else:
        (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        evaluate(reference, folder)


def test_an_empty_line_is_a_class_with_an_empty_name(reference, tmp_path):
    """CLIP_benchmark's clevr_closest_object_distance has one, and the labels count it."""
    folder = classification(tmp_path / "task")
    (folder / "classnames.txt").write_text("\n".join(["", *CLASSES[1:-1], ""]) + "\n\n")
    (task,) = open_tasks([folder])
    assert task.classes == ["", *CLASSES[1:-1], "", ""]
    assert evaluate(reference, folder).metrics.keys() == {"acc1", "acc5", "mean_per_class_recall"}


@pytest.mark.parametrize(
    "caption, message",
    [(b"a" * 60_000, "a text of 60000 characters"), (b"a\n" * 1001, "1001 captions, not 1 to 1000")],
)
def test_captions_are_bounded(caption, message, reference, tmp_path):
    write_task(tmp_path / "task", [samples([b"comma", caption], "txt")], "retrieval")
    with pytest.raises(UserError, match=rf"s0000001\.txt in .*{message}"):
        evaluate(reference, tmp_path / "task")


def test_image_without_a_caption_is_refused(reference, tmp_path):
    write_task(tmp_path / "task", [samples([b"comma", b""], "txt")], "retrieval")
    with pytest.raises(UserError, match=r"s0000001\.txt in .*no caption"):
        evaluate(reference, tmp_path / "task")


@pytest.mark.parametrize(
    "label, message",
    [
        (npy([1, 0]), r"shape \(2,\); classnames.txt has 6 lines"),
        (npy([2, 0, 0, 0, 0, 0]), "not 0 or 1"),
        (npy(np.array([None] * 6)), "allow_pickle=False"),
        (b"pickle", r"s0000000\.npy"),
    ],
)
def test_label_array_that_is_none_is_refused(label, message, reference, tmp_path):
    write_task(tmp_path / "task", [samples([label], "npy")], "multilabel")
    with pytest.raises(UserError, match=message):
        evaluate(reference, tmp_path / "task")
