"""Emoji by CLDR's names and Tux Paint's stamps, read from packages as data."""

import io
import json
import tarfile

import pytest
from PIL import Image

from experiments.clip.errors import UserError
from experiments.clip.icons.transfer import Named, emoji_names, emoji_task, stamps_digest, stamps_task

ENGLISH = {"1F600": "grinning face", "1F468": "man: red hair", "1F452": "woman’s hat", "1F3F4": "pirate flag"}


def write_archive(path, content):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_names_are_those_of_whole_emoji(tmp_path):
    entries = [{"hexcode": "1F600", "label": "a", "group": 0}, {"hexcode": "1F1E6", "label": "regional indicator A"}]
    content = {"package/en/data.json": json.dumps(entries).encode(), "package/en/compact.json": b"no JSON"}
    assert emoji_names(write_archive(tmp_path / "e.tgz", content), "en") == {"1F600": "a"}
    with pytest.raises(UserError, match=r"has no emoji names in 'xx': choose among en"):
        emoji_names(tmp_path / "e.tgz", "xx")


@pytest.mark.parametrize("data", [b"{}", b"[1]", b'[{"group": 0}]', b"["], ids=["object", "number", "bare", "cut"])
def test_another_archive_is_one_line(data, tmp_path):
    path = write_archive(tmp_path / "e.tgz", {"package/en/data.json": data})
    if data == b"{}":
        assert emoji_names(path, "en") == {}
        return
    with pytest.raises(UserError, match=r"e\.tgz is not the archive of emojibase-data"):
        emoji_names(path, "en")


def test_pictures_are_named_over_all_names_of_a_language():
    shown = ["man red hair", "womanshat", "unknown", "pirate flag", "GrinningFace", "white heavy check mark", ""]
    pictures = [Named(name.encode(), name) for name in shown]
    english = ENGLISH | {"2705": "check mark button"}
    names = {"1F600": "visage", "1F468": "homme", "1F452": "chapeau", "2705": "coche"}
    task = emoji_task(pictures, english, names, "fr")
    assert (task.name, task.kind, list(task.classes)) == ("emoji-fr", "classification", list(names.values()))
    assert [(row.image.decode(), task.classes[int(row.label)]) for row in task.rows] == [
        ("man red hair", "homme"),
        ("womanshat", "chapeau"),
        ("GrinningFace", "visage"),
        ("white heavy check mark", "coche"),
    ]


@pytest.fixture
def stamps(tmp_path):
    folder = tmp_path / "stamps"
    (folder / "animals").mkdir(parents=True)
    Image.new("RGBA", (448, 100), (255, 0, 0, 0)).save(folder / "animals" / "cat.png")
    (folder / "animals" / "cat.txt").write_text("A cat.\nde.utf8=Eine Katze.\nfr.utf8=\n")
    Image.new("RGB", (10, 10), (255, 0, 0)).save(folder / "dog.png")
    (folder / "dog.txt").write_text("A dog.\n")
    (folder / "bird.txt").write_text("A bird.\n")
    (folder / "bird.svg").write_text("<svg/>")
    return folder


def test_stamps_have_sentences_in_some_languages(stamps):
    task = stamps_task(stamps, "en")
    assert (task.name, list(task.classes), [row.label for row in task.rows]) == (
        "stamps-en",
        ["A cat.", "A dog."],
        ["0", "1"],
    )
    cat, dog = (Image.open(io.BytesIO(row.image)) for row in task.rows)
    assert (cat.size, cat.getpixel((0, 0))) == ((224, 50), (255, 255, 255))
    assert (dog.size, dog.getpixel((0, 0))) == ((10, 10), (255, 0, 0))
    assert list(stamps_task(stamps, "de").classes) == ["Eine Katze."]
    assert stamps_task(stamps, "fr") is None


def test_the_digest_tells_other_stamps(stamps, tmp_path):
    before = stamps_digest(stamps)
    (stamps / "dog.txt").write_text("A dog!!\n")
    assert stamps_digest(stamps) not in (before, "")
    assert stamps_digest(tmp_path / "nothing") == ""


def test_a_damaged_stamp_is_one_line(stamps):
    (stamps / "dog.png").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"the stamp .*dog\.png cannot be read .*: install tuxpaint-stamps-default again"
    ):
        stamps_task(stamps, "en")
