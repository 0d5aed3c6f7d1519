"""Folders of images, one for each class: the names of the classes, their order, and what is refused."""

import shutil

import pytest
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from task_folders import CLASSES, LABELS, class_folders, classification, evaluate, picture, samples, write_task
from torchvision.datasets import ImageFolder

from experiments.clip.errors import UserError
from experiments.clip.evaluation.tasks import open_tasks


def folders(path, names):
    for number, name in enumerate(names):
        (path / name).mkdir(parents=True)
        (path / name / "0.png").write_bytes(picture(number))
    return path


def classes(path):
    (task,) = open_tasks([path])
    return task.classes


def test_scores_are_those_of_the_same_images_in_shards(reference, tmp_path):
    folder = class_folders(tmp_path / "data")
    names = sorted({CLASSES[label] for label in LABELS})
    order = sorted(range(len(LABELS)), key=lambda k: (names.index(CLASSES[LABELS[k]]), str(k)))
    members = [samples([b"%d" % names.index(CLASSES[LABELS[k]])], "cls", k) for k in order]
    shards = write_task(tmp_path / "shards", [[one for sample in members for one in sample]], classes=names)
    found = evaluate(reference, folder, batch_size=4)
    assert found.metrics == evaluate(reference, shards, batch_size=4).metrics
    assert (found.name, found.samples) == ("data-val", len(LABELS))


def test_classes_have_the_order_of_torchvisions_folders(tmp_path):
    folder = class_folders(tmp_path)
    (folder / "comma" / "notes.txt").write_text("passed over")
    (folder / "comma" / "._1.png").write_bytes(b"of a Mac")
    (task,) = open_tasks([folder])
    (folder / "comma" / "._1.png").unlink()
    assert [name.replace(" ", "_") for name in task.classes] == ImageFolder(folder).classes
    paths = [str(shard.path / name) for shard in task.shards for name in shard.files]
    assert paths == [path for path, _ in ImageFolder(folder).samples]


def test_imagenets_classes_have_open_clips_names_and_prompts(tmp_path):
    folder = folders(tmp_path / "val", ["n03888257", "n01440764", "n02123045"])
    (task,) = open_tasks([folder])
    assert task.classes == ["tench", "tabby cat", "parachute"]
    assert task.templates == [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]


def test_a_thousand_numbers_are_imagenets_classes(tmp_path):
    assert classes(folders(tmp_path / "v2", map(str, range(1000)))) == list(IMAGENET_CLASSNAMES)


def test_other_classes_are_named_by_a_file_or_by_their_folders(tmp_path):
    folder = folders(tmp_path / "digits", ["10", "9", "2"])
    assert classes(folder) == ["2", "9", "10"]
    (folder / "classnames.txt").write_text("two\n\nten\n")
    assert classes(folder) == ["two", "", "ten"]
    (folder / "classnames.txt").write_text("two\nten\n")
    with pytest.raises(UserError, match=r"classnames\.txt has 2 lines for 3 folders"):
        classes(folder)


def nested(path):
    shutil.move(folders(path.with_name("inner"), ["a", "b"]), path / "train")


def test_a_folder_of_tasks_is_none(tmp_path):
    classification(tmp_path / "wds" / "task")
    with pytest.raises(UserError, match=r"wds holds tasks: name them, like .*wds/\*"):
        open_tasks([tmp_path / "wds"])


@pytest.mark.parametrize(
    "damage, message",
    [
        (nested, r"train holds no JPEG, PNG or WebP image.* folder of images for each class"),
        (lambda path: (path / "c").mkdir(), "c holds no JPEG"),
        (lambda path: shutil.rmtree(path / "a"), r"has one folder, b: a task has a folder for each"),
        (lambda path: (path / "a" / "0.png").write_bytes(b"GIF89a"), r"a/0\.png is of no use \(unreadable image\)"),
        (lambda path: (path / "zeroshot_classification_templates.txt").write_text("photo"), "the line 'photo'"),
    ],
)
def test_damage_is_refused_by_name(damage, message, reference, tmp_path):
    folder = folders(tmp_path / "data", ["a", "b"])
    damage(folder)
    with pytest.raises(UserError, match=message):
        evaluate(reference, folder)


def test_images_in_folders_of_a_class_are_its_images_as_torchvision_takes_them(tmp_path):
    folder = folders(tmp_path / "data", ["a", "b"])
    folders(folder / "a", ["more", ".thumbnails"])
    folders(folder / "a" / "more", ["still"])
    (folder / "b" / "link").symlink_to(folder / "a" / "more", target_is_directory=True)
    (task,) = open_tasks([folder])
    shutil.rmtree(folder / "a" / ".thumbnails")
    paths = {(str(shard.path / name), shard.label) for shard in task.shards for name in shard.files}
    assert paths == set(ImageFolder(folder).samples) and len(paths) == 6


def test_images_that_are_not_decoded_are_not_passed_over(tmp_path):
    folder = folders(tmp_path / "data", ["a", "b"])
    (folder / "b" / "1.TIFF").write_bytes(b"II*")
    with pytest.raises(UserError, match=r"b holds 1 images that are not JPEG, PNG or WebP, such as 1.TIFF: convert"):
        open_tasks([folder])
