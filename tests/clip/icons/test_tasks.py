"""The held-out icons as tasks that `evaluate` runs, with emoji and stamps beside them where these are."""

import io
import json
import tarfile

import pytest
from PIL import Image

from experiments.clip.errors import UserError
from experiments.clip.evaluation.task_files import open_task
from experiments.clip.glyphs.dataset import StoredPair, read_samples
from experiments.clip.icons import tasks
from experiments.clip.icons.options import IconTasks
from experiments.clip.icons.tasks import icon_tasks, run_icon_tasks
from experiments.clip.run import main

pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")


@pytest.fixture
def no_stamps(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "STAMPS", tmp_path / "no stamps")


def pair(number, caption, *categories, kind="interface"):
    image = Image.new("RGB", (8, 8), (number, 0, 0))
    return StoredPair(number, f"k{number}", image, caption, {"kind": kind, "categories": list(categories)})


def test_names_categories_and_one_picture_of_each_name():
    pairs = [
        pair(n, f"thing {n % 30}", *(["Food", "Sports  Cars"][n % 2 :][:1]), *["Other"] * (n > 49)) for n in range(60)
    ]
    names, retrieval, categories = icon_tasks(pairs)
    assert (names.name, names.kind, list(names.classes)) == ("icon-names", "classification", sorted(names.classes))
    assert len(names.classes) == 30
    assert [names.classes[int(row.label)] for row in names.rows] == [each.caption for each in pairs]
    assert [row.label for row in retrieval.rows] == [f"thing {n}" for n in range(30)]
    assert Image.open(io.BytesIO(retrieval.rows[7].image)).getpixel((0, 0)) == (7, 0, 0)
    assert (categories.name, list(categories.classes)) == ("icon-categories", ["food", "sports cars"])
    assert [int(row.label) for row in categories.rows] == [n % 2 for n in range(50)]


def test_categories_need_two_classes_of_twenty():
    few = [pair(n, "a", "Food") for n in range(30)] + [pair(n, "a", "Rare") for n in range(19)]
    assert [task.name for task in icon_tasks(few)] == ["icon-names", "icon-retrieval"]


@pytest.mark.usefixtures("no_stamps")
def test_the_command_writes_tasks_that_can_be_opened_and_names_what_would_bring_more(
    icon_data, manifest, tmp_path, capsys
):
    options = IconTasks(icon_data, out=tmp_path / "tasks")
    run_icon_tasks(options)
    printed = capsys.readouterr().out
    assert "run `npm pack emojibase-data` and give its file as --emoji" in printed
    assert "run `apt-get install tuxpaint-stamps-default`" in printed
    task = open_task(tmp_path / "tasks" / "icon-names")
    held_out = list(read_samples(manifest, "test"))
    assert (task.samples, task.classes) == (len(held_out), sorted({each.caption for each in held_out}))
    before = (tmp_path / "tasks" / "tasks.json").stat().st_mtime_ns
    run_icon_tasks(options)
    assert (tmp_path / "tasks" / "tasks.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds the tasks of other data"):
        run_icon_tasks(IconTasks(icon_data, "validation", out=tmp_path / "tasks"))


def emoji_archive(path, **names):
    with tarfile.open(path, "w:gz") as archive:
        for language, labels in names.items():
            entries = [{"label": label, "hexcode": f"1F{n}", "group": 0} for n, label in enumerate(labels)]
            data = json.dumps([*entries, {"label": "regional indicator A", "hexcode": "1F1E6"}]).encode()
            member = tarfile.TarInfo(f"package/{language}/data.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_emoji_and_stamps_have_a_task_for_each_language(icon_data, manifest, tmp_path, capsys, monkeypatch):
    first = next(read_samples(manifest, "test"))
    monkeypatch.setattr(tasks, "read_samples", lambda *_: [pair(1, "red heart", kind="emoji"), first])
    archive = emoji_archive(tmp_path / "emoji.tgz", en=["Grinning face", "red heart"], de=["Grinsen", "Herz"])
    stamps = tmp_path / "stamps"
    stamps.mkdir()
    Image.new("RGBA", (300, 100), (0, 0, 0, 0)).save(stamps / "doll.png")
    (stamps / "doll.txt").write_text("An old doll.\nfr.utf8=Une poupée.\n")
    words = ["icon-tasks", "--cache", str(icon_data.cache), "--pixels", "16", "--out", str(tmp_path / "tasks")]
    assert main([*words, "--emoji", str(archive), "--stamps", str(stamps), "--languages", "en", "de"]) == 0
    assert "Tux Paint's stamps in de: no picture has a name in it" in " ".join(capsys.readouterr().out.split())
    found = {path.name for path in (tmp_path / "tasks").iterdir() if path.is_dir()}
    assert found == {"icon-names", "icon-retrieval", "emoji-en", "emoji-de", "stamps-en"}
    emoji = open_task(tmp_path / "tasks" / "emoji-de")
    assert (emoji.classes, emoji.samples) == (["Grinsen", "Herz"], 1)
    assert open_task(tmp_path / "tasks" / "stamps-en").classes == ["An old doll."]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--emoji", "nothing.tgz"],
            "--emoji nothing.tgz is not a file: give the archive that `npm pack emojibase-data`",
        ),
        (["--stamps", "nothing"], "--stamps nothing has no stamps: name the folder of tuxpaint-stamps-default"),
    ],
    ids=["emoji", "stamps"],
)
def test_what_is_named_and_not_there_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["icon-tasks", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
