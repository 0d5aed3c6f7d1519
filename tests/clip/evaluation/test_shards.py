"""The parts of a task's samples, in tar files and in folders."""

import pytest
from task_folders import classification, picture

from experiments.clip.evaluation import shards
from experiments.clip.evaluation.shards import ClassFolder, RawSample, Unreadable
from experiments.clip.evaluation.tasks import open_tasks


@pytest.fixture
def task(tmp_path):
    return open_tasks([classification(tmp_path / "task")])[0]


def test_a_tar_file_is_read_in_any_order(task):
    first = task.shards[0]
    assert list(first.read([3, 0])) == [
        RawSample(b"1", None, [picture(3, "png")]),
        RawSample(b"0", None, [picture(0, "png")]),
    ]
    assert first.name(3, 0) == f"s0000003.cls in {first.path}"
    assert first.name(3, 1) == f"s0000003.png in {first.path}"
    assert first.images().tolist() == [1] * 7


def test_a_file_that_became_shorter_is_noticed(task):
    first = task.shards[0]
    first.path.write_bytes(first.path.read_bytes()[:6000])
    with pytest.raises(Unreadable, match="became shorter"):
        list(first.read(range(7)))
    assert first.name(6, 0) == f"a member in {first.path}"


def test_a_folder_of_a_class_is_bounded(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(0))
    folder = ClassFolder(tmp_path, ("a.png", "b.png"), 4)
    assert list(folder.read([1])) == [RawSample(4, None, [picture(0)])]
    assert folder.name(1, 1) == str(tmp_path / "b.png")
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(Unreadable, match="more than 100 bytes"):
        next(folder.read([0]))


def test_a_digest_follows_places_and_sizes(task, tmp_path):
    same = open_tasks([classification(tmp_path / "same" / "task")])[0]
    assert same.fingerprint == task.fingerprint
    (same.folder / "classnames.txt").write_text((same.folder / "classnames.txt").read_text() + "more\n")
    with (same.shards[1].path).open("ab") as file:
        file.write(bytes(512))
    assert same.shards[1].digest() != task.shards[1].digest()
    assert open_tasks([same.folder])[0].fingerprint != task.fingerprint
