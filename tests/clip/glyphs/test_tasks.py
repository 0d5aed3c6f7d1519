"""The held-out glyphs as zero-shot tasks: the test split, written completely or not at all."""

import io
import shutil
import tarfile

import pytest
from PIL import Image

from experiments.clip.cli.options import Data
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.evaluation import evaluate
from experiments.clip.glyphs.options import GlyphTasks
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.glyphs.tasks import run_glyph_tasks, write_glyph_tasks
from tests.clip import task_folders


def test_glyph_tasks_are_the_test_split(glyph_tasks, manifest):
    assert glyph_tasks.keys() == {"glyph-names", "glyph-base-letter", "glyph-retrieval"}
    expected = list(read_samples(manifest, "test"))
    folder = glyph_tasks["glyph-names"]
    names = (folder / "classnames.txt").read_text().splitlines()
    assert names == list(manifest.vocabulary)
    assert (folder / "test" / "nshards.txt").read_text() == "3\n"
    found = []
    for number in range(3):
        with tarfile.open(folder / "test" / f"{number}.tar") as archive:
            members = {name: archive.extractfile(name).read() for name in archive.getnames()}
        keys = sorted({name.partition(".")[0] for name in members})
        found += [(members[f"{key}.png"], names[int(members[f"{key}.cls"])]) for key in keys]
    assert len(found) == len(expected) == 150
    for (image, name), sample in zip(found, expected, strict=True):
        assert Image.open(io.BytesIO(image)).tobytes() == sample.image.tobytes()
        assert name == sample.meta["name"]


def test_glyph_tasks_are_complete_or_absent(manifest, tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    written = write_glyph_tasks(manifest, folder, shard_size=64)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_glyph_tasks(manifest, folder, shard_size=64) == written
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="holds the tasks of other data"):
        write_glyph_tasks(manifest, folder, shard_size=65)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        write_glyph_tasks(manifest, other)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    damaged = manifest.folder.with_name("damaged")
    shutil.copytree(manifest.folder, damaged)
    shard = manifest.splits["test"].shards[-1]
    (damaged / shard.name).write_bytes(bytes(shard.bytes))
    with pytest.raises(UserError, match=r"breaks off|ends before"):
        write_glyph_tasks(type(manifest)(damaged, *list(vars(manifest).values())[1:]), tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tasks"]


@pytest.mark.slow
def test_glyph_tasks_agree_with_the_evaluation_of_pairs_in_memory(glyph_tasks, manifest, reference):
    pairs = PreparedPairs(manifest, "test", reference)
    result = evaluate(
        reference.encode_image, reference.encode_text, pairs.image_batches(), pairs.captions, manifest.vocabulary
    )
    named = task_folders.evaluate(reference, glyph_tasks["glyph-names"])
    assert named.samples == len(pairs)
    assert named.metrics["acc1"] == pytest.approx(result.naming.top1, abs=1e-9)
    assert named.metrics["acc5"] == pytest.approx(result.naming.top5, abs=1e-9)
    letters = task_folders.evaluate(reference, glyph_tasks["glyph-base-letter"])
    assert letters.metrics["acc1"] == pytest.approx(result.attributes["base letter"].top1, abs=1e-9)
    assert letters.metrics["mean_per_class_recall"] == pytest.approx(result.attributes["base letter"].balanced)


def test_the_command_writes_the_tasks_and_prints_their_folders(glyph_cache, tmp_path, capsys):
    run_glyph_tasks(GlyphTasks(Data("swapped", "small", glyph_cache), tmp_path / "tasks"))
    folders = sorted(path for path in (tmp_path / "tasks").iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["glyph-base-letter", "glyph-names", "glyph-retrieval"]
    printed = "".join(capsys.readouterr().out.split())
    assert all(f"task{''.join(str(path).split())}" in printed for path in folders)
